"""Models, data and recorders that the tests share."""

import importlib.util
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer import HPUInferenceAccelerator, InferencePipeline, emulator

ALL_OFF: dict[str, Any] = {"hpu_graphs": False, "async_copy": False, "pipelining": False}


def script(path: Path) -> ModuleType:
    """A script of the repository that lies in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Net(LightningModule):
    """A small network that `predict_step` calls as a module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch)


class Broken(Exception):
    """What a faulty part raises."""


class BrokenStep(Net):
    """Fails in batch 4."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 4:
            raise Broken("step 4")
        return super().predict_step(batch, batch_idx)


class Rows(Dataset[Tensor]):
    """Row i is filled with numbers that only i has."""

    def __init__(self, length: int = 10, width: int = 4) -> None:
        self.rows = torch.arange(length * width, dtype=torch.float32).reshape(length, width) / 7

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def rows(length: int = 10, batch_size: int = 2) -> DataLoader[Tensor]:
    return DataLoader(Rows(length), batch_size=batch_size)


def running() -> int:
    """Threads that there are, but for tqdm's monitor, which torch.fx or a progress bar starts for good."""
    return sum(thread.name != "tqdm_monitor" for thread in threading.enumerate())


def trainer(accelerator: Any, callbacks: Sequence[Callback] = (), **kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    # Some callbacks leave files where the trainer is at home.
    quiet["default_root_dir"] = tempfile.gettempdir()
    return Trainer(accelerator=accelerator, logger=False, callbacks=list(callbacks), **(quiet | kwargs))


def predict(accelerator: Any, module: LightningModule, loaders: Any, **kwargs: Any) -> Any:
    return trainer(accelerator, **kwargs).predict(module, loaders)


@contextmanager
def installed(**settings: Any) -> Iterator[None]:
    """The emulated HPU with these settings, counters at zero."""
    emulator.install(emulator.EmulatorConfig(**settings))
    try:
        yield
    finally:
        emulator.uninstall()


class Clock:
    """What the emulator takes for `time` in tests with the fixture `clock`: only sleeps move it, and take no time."""

    def __init__(self) -> None:
        self.now = 1.0
        self.slept: dict[str, float] = defaultdict(float)
        """Seconds per thread; those of the emulator have the names of their queues."""
        self._lock = threading.Lock()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds
            self.slept[threading.current_thread().name.removeprefix("hpu-emulator-")] += seconds


def assert_equal(actual: Any, expected: Any) -> None:
    """Same structure and same types throughout, tensors equal within float32 tolerance."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name in expected:
            assert_equal(actual[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    else:
        assert actual == expected


def assert_like_stock(
    accelerator: HPUInferenceAccelerator, module: LightningModule, loaders: Any, **kwargs: Any
) -> Trainer:
    """Predictions equal those of stock Lightning on the CPU."""
    expected = predict("cpu", module, loaders, **kwargs)
    ours = trainer(accelerator, **kwargs)
    assert_equal(ours.predict(module, loaders), expected)
    return ours


class HookLog(Callback):
    """Records every predict hook with what identifies its call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.calls.append(("start",))

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.calls.append(("epoch_start",))

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.calls.append(("batch_start", dataloader_idx, batch_idx, *_state(trainer)))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        first = batch.cpu().flatten()[0].item()
        self.calls.append(("batch_end", dataloader_idx, batch_idx, first, *_state(trainer)))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.calls.append(("epoch_end", len(trainer.predict_loop.predictions)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.calls.append(("end",))

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]

    @property
    def order(self) -> str:
        """Starts and ends as a sentence, like `s0 s1 e0 e1`."""
        short = {"batch_start": "s", "batch_end": "e"}
        return " ".join(f"{short[call[0]]}{call[2]}" for call in self.named(*short))


def _state(trainer: Trainer) -> tuple[Any, ...]:
    progress: Any = trainer.predict_loop.batch_progress
    return progress.is_last_batch, progress.current.ready, progress.total.ready


class Writer(BasePredictionWriter):
    """Records what a prediction writer gets to see."""

    def __init__(self, interval: str) -> None:
        super().__init__(interval)  # type: ignore[arg-type]
        self.batches: list[tuple[int, int, list[int], Any]] = []
        self.epoch: Any = None

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert batch_indices is not None
        self.batches.append((dataloader_idx, batch_idx, list(batch_indices), prediction.cpu()))

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        self.epoch = (list(predictions), [list(indices) for indices in batch_indices])


class Gate(nn.Module):
    """Waits in each call until it is opened, and counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.opened, self.entered = threading.Event(), threading.Event()
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(float(x[0]))
        self.entered.set()
        assert self.opened.wait(60)
        return x + 1


@contextmanager
def gated(**options: Any) -> Iterator[tuple[Gate, InferencePipeline]]:
    """A pipeline on the CPU, whose first batch is in the model."""
    gate = Gate()
    pipeline = InferencePipeline(gate, "cpu", **options)
    try:
        first = pipeline.submit(torch.zeros(1))
        assert gate.entered.wait(60)
        yield gate, pipeline
        gate.opened.set()
        assert first.result(60) == torch.ones(1)
    finally:
        gate.opened.set()
        pipeline.close()
