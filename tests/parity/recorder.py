"""The side-by-side recorder: one case on stock Lightning and on the plugin, everything that can be seen compared."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_hpu_infer import HPUInferenceAccelerator
from lightning_hpu_infer.devices import select_device
from lightning_hpu_infer.graphs import GraphCounts
from tests.helpers import trainer


@dataclass
class Case:
    """What is predicted: fresh objects, made anew for each side."""

    module: LightningModule
    loaders: Any = None
    datamodule: LightningDataModule | None = None
    callbacks: Sequence[Callback] = ()
    trainer: dict[str, Any] = field(default_factory=dict)
    predict: dict[str, Any] = field(default_factory=dict)
    before: Callable[[Trainer, "Case"], Any] | None = None
    """What the user does with the trainer first, as `fit` or an earlier `predict`."""


@dataclass
class Record:
    """All that a run shows."""

    predictions: Any = None
    error: str = ""
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    writes: list[tuple[Any, ...]] = field(default_factory=list)
    epoch_writes: list[Any] = field(default_factory=list)
    after: tuple[Any, ...] = ()
    warnings: list[str] = field(default_factory=list)
    graphs: GraphCounts | None = None
    """What graphs did in the run; None on stock Lightning and without graphs."""


class Watch(BasePredictionWriter):
    """A callback and writer that records every predict hook with the state of the loop."""

    def __init__(self, record: Record) -> None:
        super().__init__("batch_and_epoch")
        self.record = record

    def __getstate__(self) -> dict[str, Any]:
        return {"record": Record()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.record.calls.append(("setup", stage))

    def _note(self, name: str) -> None:
        self.record.calls.append((name,))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note("on_predict_start")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note("on_predict_end")

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note("on_predict_epoch_start")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note("on_predict_epoch_end")
        super().on_predict_epoch_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.record.calls.append(("on_exception", type(exception).__name__))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.record.calls.append(("teardown", stage))

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.record.calls.append(("batch_start", dataloader_idx, batch_idx, host(batch), *_state(trainer)))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        call = ("batch_end", dataloader_idx, batch_idx, host(batch), host(outputs), *_state(trainer))
        self.record.calls.append(call)
        super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

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
        self.record.writes.append((dataloader_idx, batch_idx, list(batch_indices or []), host(prediction)))

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        self.record.epoch_writes.append((host(predictions), [list(indices) for indices in batch_indices]))


def _state(trainer: Trainer) -> tuple[Any, ...]:
    loop: Any = trainer.predict_loop
    progress = loop.batch_progress
    counters = [(t.ready, t.started, t.processed) for t in (progress.current, progress.total)]
    return progress.is_last_batch, list(loop.current_batch_indices), *counters


def host(data: Any) -> Any:
    """A copy of data on the host, in plain Python with the type of every container, to be compared later."""
    if isinstance(data, Tensor):
        return data.detach().cpu().clone()
    if isinstance(data, np.ndarray):
        return data.copy()
    if is_dataclass(data) and not isinstance(data, type):
        return type(data).__name__, {f.name: host(getattr(data, f.name)) for f in fields(data)}
    if isinstance(data, dict):
        return type(data).__name__, {name: host(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data).__name__, [host(value) for value in data]
    if hasattr(data, "data") and isinstance(data.data, dict):
        return type(data).__name__, host(data.data)
    if hasattr(data, "__dict__") and not isinstance(data, type):
        return type(data).__name__, host(vars(data))
    return data


@contextmanager
def _warnings_into(texts: list[str]) -> Iterator[None]:
    """Note all warnings, none of which is an error, as it is to users."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "No HPU was found")  # once per process; the tests on the CPU mean it
        yield
    texts.extend(str(each.message) for each in given)


def run(accelerator: Any, make: Callable[[], Case]) -> Record:
    """Predict one case and record it."""
    record = Record()
    with _warnings_into(record.warnings):
        _run(accelerator, make(), record)
    return record


def _run(accelerator: Any, case: Case, record: Record) -> None:
    ours = trainer(accelerator, [*case.callbacks, Watch(record)], **case.trainer)
    if case.before is not None:
        case.before(ours, case)
        record.calls.clear()
        record.writes.clear()
        record.epoch_writes.clear()
    try:
        predictions = ours.predict(case.module, case.loaders, datamodule=case.datamodule, **case.predict)
        assert all(leaf.device.type == "cpu" for leaf in tree_leaves(predictions) if isinstance(leaf, Tensor))
        record.predictions = host(predictions)
    except Exception as error:
        record.error = f"{type(error).__name__}: {error}"
    loop: Any = ours.predict_loop
    progress = loop.batch_progress
    record.graphs = getattr(loop, "graph_counts", None)
    record.after = (
        progress.current.ready,
        ours.state.status.value,
        ours.num_predict_batches,
        {name: module.training for name, module in case.module.named_modules()},
        {parameter.device.type for parameter in case.module.parameters()},
        sorted(name for name, module in case.module.named_modules() if "forward" in vars(module)),
        dict(sorted(getattr(case.module, "seen", {}).items())),
    )


def same(actual: Any, expected: Any, where: str = "") -> None:
    """Equal in structure and type; tensors equal in dtype, shape and, within float tolerance, in value."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), where
        torch.testing.assert_close(actual, expected, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, list | tuple):
        assert type(actual) is type(expected), where
        assert len(actual) == len(expected), f"{where}: {len(actual)} instead of {len(expected)}: {actual}"
        for place, (one, other) in enumerate(zip(actual, expected, strict=True)):
            same(one, other, f"{where}[{place}]")
    elif isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for name in expected:
            same(actual[name], expected[name], f"{where}.{name}")
    else:
        assert actual == expected, f"{where}: {actual!r} instead of {expected!r}"


def compare(flags: dict[str, Any], make: Callable[[], Case], stock: Record) -> Record:
    """Run a case on the plugin and compare with its record on stock Lightning.

    Returns the record of the plugin, whose warnings and graphs stock cannot have.
    """
    accelerator = HPUInferenceAccelerator(**flags)
    ours = run(accelerator, make)
    same(ours.error, stock.error, "error")
    same(ours.predictions, stock.predictions, "predictions")
    same(ours.epoch_writes, stock.epoch_writes, "epoch_writes")
    same(ours.after, stock.after, "after")
    in_flight = accelerator.config.in_flight_depth(select_device().type)
    if accelerator.config.defer_hooks is not True or not in_flight:  # with "auto" the recorder's hooks are not late
        same(ours.calls, stock.calls, "calls")
        same(ours.writes, stock.writes, "writes")
        return ours
    # Starts and ends each stay in order, and whatever surrounds the batches stays where it is.
    same(_named(ours, "batch_start"), _named(stock, "batch_start"), "starts")
    ends, stock_ends = _named(ours, "batch_end"), _named(stock, "batch_end")
    same(ends, stock_ends, "ends")
    same(ours.writes, stock.writes, "writes")
    same(_surroundings(ours), _surroundings(stock), "surroundings")
    order = [(call[1], call[2]) for call in ours.calls if call[0] == "batch_start"]
    pool = 2 * accelerator.config.postprocess_workers if accelerator.config.postprocess else 0
    position = {("s", *key): place for place, key in enumerate(order)}
    started = -1
    for call in ours.calls:
        if call[0] == "batch_start":
            started += 1
        elif call[0] == "batch_end":
            behind = started - position["s", call[1], call[2]]
            assert 0 <= behind <= in_flight + pool
    return ours


def _named(record: Record, name: str) -> list[tuple[Any, ...]]:
    return [call for call in record.calls if call[0] == name]


def _surroundings(record: Record) -> list[tuple[Any, ...]]:
    return [call for call in record.calls if not call[0].startswith("batch_")]
