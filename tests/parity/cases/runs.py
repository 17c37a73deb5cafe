"""Callbacks, options of the Trainer, several runs of one Trainer, and errors."""

import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.profilers import PyTorchProfiler
from packaging.version import Version
from torch import Tensor

from tests.helpers import Net, rows
from tests.parity.cases.registry import Stepped, Transfers, case, items
from tests.parity.recorder import Case

# Callbacks and hooks


class HookedModule(Net):
    """The module's own batch hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {"starts": [], "ends": []}

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["starts"].append(batch_idx)

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["ends"].append(batch_idx + int(outputs.shape[0]) * 100)


@case(captures=1, replays=2)
def hooks_of_the_module() -> Case:
    return Case(HookedModule(), rows(9, 2))


class Doubles(Callback):
    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        outputs["scores"].mul_(2)
        outputs["added"] = 1
        outputs.pop("dropped")


@case(captures=1, replays=2)
def a_callback_that_changes_outputs() -> Case:
    module = Stepped(lambda m, x, i: {"scores": m.net(x), "dropped": x})
    return Case(module, rows(8, 2), callbacks=[Doubles()])


class ChangesBatches(Callback):
    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any, **__: Any) -> None:
        batch["x"] = batch["x"] + 1


@case(captures=1, replays=2)
def a_callback_that_changes_batches() -> Case:
    module = Stepped(lambda m, b, i: m.net(b["x"]))
    return Case(module, items(lambda x, i: {"x": x}), callbacks=[ChangesBatches()])


# Trainer


@case(captures=1, replays=2)
def predictions_not_returned() -> Case:
    return Case(Net(), rows(9, 2), predict={"return_predictions": False})


@case(captures=1, replays=2)
def without_inference_mode() -> Case:
    return Case(Net(), rows(9, 2), trainer={"inference_mode": False})


@case(captures=1, replays=2)
def bf16_true() -> Case:
    return Case(Net(), rows(9, 2), trainer={"precision": "bf16-true"})


@case(captures=1, replays=2)
def double_precision() -> Case:
    return Case(Net(), rows(9, 2), trainer={"precision": "64-true"})


@case(captures=1, replays=2)
def a_profiler() -> Case:
    return Case(Net(), rows(9, 2), trainer={"profiler": "simple"})


@case(captures=1, replays=2)
def a_pytorch_profiler() -> Case:
    profiler = PyTorchProfiler(dirpath=tempfile.gettempdir(), filename="profile", export_to_chrome=False)
    return Case(Net(), rows(9, 2), trainer={"profiler": profiler})


def predict_first(trainer: Trainer, case: Case) -> None:
    trainer.predict(case.module, case.loaders)


@case(captures=0, replays=4)
def predicting_twice() -> Case:
    return Case(Net(), rows(9, 2), before=predict_first)


def checkpoint_first(trainer: Trainer, case: Case) -> None:
    folder = Path(tempfile.mkdtemp())
    trainer.predict(case.module, case.loaders)
    trainer.save_checkpoint(folder / "a.ckpt")
    with torch.no_grad():
        for parameter in case.module.parameters():
            parameter.zero_()
    case.predict["ckpt_path"] = folder / "a.ckpt"


@case(captures=0, replays=4)
def from_a_checkpoint() -> Case:
    return Case(Net(), rows(9, 2), before=checkpoint_first)


class FindsBatchSize(Net):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def predict_dataloader(self) -> Any:
        return rows(40, self.batch_size)


# Lightning before 2.6 doubles the size once more in as many trials.
FINDS_8 = Version(lightning.__version__) >= Version("2.6")


@case(captures=3 if FINDS_8 else 4, replays=34 if FINDS_8 else 30)
def a_batch_size_finder() -> Case:
    return Case(FindsBatchSize(), callbacks=[BatchSizeFinder(steps_per_trial=2, max_trials=3)])


# Errors


def failing(where: str) -> Callable[..., Any]:
    def step(m: Net, x: Tensor, i: int) -> Any:
        if i == 3:
            raise ValueError(where)
        return m.net(x)

    return step


@case(captures=2, replays=0)
def a_fault_in_the_step() -> Case:
    return Case(Stepped(failing("step")), rows(12, 2))


def bad_row(x: Tensor, i: int) -> Tensor:
    if i == 7:
        raise ValueError("row 7")
    return x


@case(captures=1, replays=1)
def a_fault_in_the_dataset() -> Case:
    return Case(Net(), items(bad_row, 12))


def bad_collate(rows: list[Tensor]) -> Tensor:
    if float(rows[0][0]) > 4:
        raise ValueError("collate")
    return torch.stack(rows)


@case(captures=1, replays=2)
def a_fault_in_collate() -> Case:
    return Case(Net(), items(lambda x, i: x, 12, collate_fn=bad_collate))


@case(captures=1, replays=1)
def a_fault_in_a_worker_process() -> Case:
    return Case(Net(), items(bad_row, 12, num_workers=1))


def terminate(m: Net, x: Tensor, i: int) -> Tensor:
    if i == 2:
        signal.raise_signal(signal.SIGTERM)
    return m.net(x)


@case(captures=3, replays=2)
def sigterm_in_the_middle() -> Case:
    return Case(Stepped(terminate), rows(12, 2))


@case(captures=1, replays=6)
def a_fault_in_a_transfer_hook() -> Case:
    module = Transfers()
    module.on_after_batch_transfer = lambda batch, dataloader_idx: bad_row(batch, int(batch[0, 0]))  # type: ignore
    return Case(module, rows(16, 2))


class BadCallback(Callback):
    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *args: Any) -> None:
        if batch_idx == 3:
            raise ValueError("start")


@case(captures=1, replays=1)
def a_fault_in_a_start_hook() -> Case:
    return Case(Net(), rows(12, 2), callbacks=[BadCallback()])
