"""Rule 2: a writer is late only where it neither uses what steps change nor changes what they use."""

import random
import time
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn
from torch.utils.data import DataLoader

from lightning_hpu_infer.late import may_write_late
from tests.dependence import assert_hooks_are_stocks, of_dicts, of_rows
from tests.helpers import Net, Rows


class OfDictsOnly(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"y": self.net(batch["x"])}


class NamedByStart(BasePredictionWriter):
    """Writes under a name that its start hook takes from the batch."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.seen: list[Any] = []

    def on_predict_batch_start(self, t: Any, m: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.file = f"{batch_idx}.pt", batch["x"].cpu().clone()

    def write_on_batch_end(self, t: Any, m: Any, prediction: Any, i: Any, batch: Any, idx: int, dl: int) -> None:
        self.seen.append((self.file, idx, prediction["y"].cpu().clone()))


class Accumulates(Net):
    """Keeps in every step what a writer reads."""

    sums: torch.Tensor
    newest: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.scale = 1
        self.head = Head(1, 1)
        self.register_buffer("sums", torch.zeros(3))
        self.register_buffer("newest", torch.zeros(2, 3))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = self.net(batch)
        global LAST
        LAST = self.last = batch_idx
        LASTS.append(batch_idx)
        self.head.last = batch_idx
        self.rows.append(len(batch))
        self.sums.add_(scores.sum(0))
        self.newest[:] = scores
        return scores * self.scale

    def latest(self) -> int:
        return self.last

    @property
    def newest_of_all(self) -> int:
        return self.latest()


def reading(read: Any) -> Any:
    """A writer that reads something of the module."""

    class Reads(BasePredictionWriter):
        def __init__(self) -> None:
            super().__init__("batch")
            self.seen: list[Any] = []

        write_on_batch_end = read

        def shown(self, module: Any) -> None:
            self.seen.append(module.last)

    return Reads


def last(self: Any, t: Any, m: Any, *_: Any) -> None:
    self.seen.append(m.last)


def length(self: Any, t: Any, module: Any, *_: Any) -> None:
    self.seen.append(len(module.rows))


def sums(self: Any, t: Any, pl_module: Any, *_: Any) -> None:
    self.seen.append(pl_module.sums.cpu().clone())


def newest(self: Any, t: Any, pl_module: Any, *_: Any) -> None:
    self.seen.append(pl_module.newest.cpu().clone())


def by_helper(self: Any, t: Any, module: Any, *_: Any) -> None:
    self.seen.append(last_of(module))


def last_of(module: Any) -> int:
    return int(module.last)


def by_method(self: Any, t: Any, module: Any, *_: Any) -> None:
    self.seen.append(module.latest())


def by_trainer(self: Any, trainer: Any, *_: Any) -> None:
    self.seen.append(trainer.lightning_module.last)


def of_global(self: Any, *_: Any) -> None:
    self.seen.append((LAST, list(LASTS[-1:])))


def changing(self: Any, t: Any, module: Any, *_: Any) -> None:
    module.scale = module.scale + 1
    self.seen.append(module.last)


def changing_a_part(self: Any, t: Any, module: Any, *_: Any) -> None:
    module.net[0].bias.data.add_(1)


def by_property(self: Any, t: Any, module: Any, *_: Any) -> None:
    self.seen.append(module.newest_of_all)


def by_part(self: Any, t: Any, module: Any, *_: Any) -> None:
    self.seen.append(module.head.last)


def by_name(self: Any, t: Any, module: Any, *_: Any) -> None:
    self.seen.append(getattr(module, "last"))  # noqa: B009


def by_alias(self: Any, t: Any, module: Any, *_: Any) -> None:
    alias = module
    self.seen.append(alias.last)


def by_own_method(self: Any, t: Any, module: Any, *_: Any) -> None:
    self.shown(module)


def by_place(self: Any, *args: Any) -> None:
    self.seen.append(args[1].last)


def by_function_in_it(self: Any, t: Any, module: Any, *_: Any) -> None:
    def inner() -> int:
        return int(module.last)

    self.seen.append(inner())


def by_state(self: Any, t: Any, module: Any, *_: Any) -> None:
    self.seen.append({name: value.cpu().clone() for name, value in module.state_dict().items()})


def by_the_dataset(self: Any, trainer: Any, *_: Any) -> None:
    self.seen.append(trainer.predict_dataloaders.dataset.last)


def drawing(self: Any, *_: Any) -> None:
    self.seen.append(random.random())


LAST = -1
LASTS = [-1]


class SharesList(BasePredictionWriter):
    """Reads a list that it has in common with the module."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.seen: list[Any] = []
        self.kept = KEPT

    def write_on_batch_end(self, t: Any, m: Any, prediction: Any, i: Any, batch: Any, idx: int, dl: int) -> None:
        self.seen.append(self.kept[-1])


KEPT: list[int] = []


class Keeps(Net):
    """Keeps in a list that somebody else holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = KEPT

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        kept = self.kept
        kept.append(batch_idx)
        return self.net(batch)


class HoldsModule(BasePredictionWriter):
    """Finds the module itself."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.seen: list[Any] = []

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.module = module

    def write_on_batch_end(self, *_: Any) -> None:
        self.seen.append(self.module.last)


class Head(nn.Linear):
    """A part of a module that keeps something."""

    last = -1


class LastRow(Rows):
    """Says which row was read last, and draws a number for it."""

    last = -1

    def __getitem__(self, index: int) -> torch.Tensor:
        self.last = index
        return self.rows[index]


class HoldsRows(BasePredictionWriter):
    """Finds the dataset itself."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.seen: list[Any] = []

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.rows: Any = None

    def on_predict_start(self, trainer: Any, module: Any) -> None:
        self.rows = trainer.predict_dataloaders.dataset

    def write_on_batch_end(self, *_: Any) -> None:
        self.seen.append(self.rows.last)


def of_last_rows() -> DataLoader[Any]:
    return DataLoader(LastRow(16), batch_size=2)


class Draws(Net):
    def on_predict_start(self) -> None:
        random.seed(0)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch) * random.random()


READS = [
    *(last, length, sums, newest, by_helper, by_method, by_trainer, of_global, changing, changing_a_part),
    *(by_property, by_part, by_name, by_alias, by_own_method, by_place, by_function_in_it, by_state),
]
WRITERS: dict[str, Any] = {
    "with a start hook": (OfDictsOnly, NamedByStart, of_dicts),
    **{read.__name__: (Accumulates, reading(read), of_rows) for read in READS},
    "what the dataset keeps": (Net, reading(by_the_dataset), of_last_rows),
    "the dataset that it holds": (Net, HoldsRows, of_last_rows),
    "random numbers": (Draws, reading(drawing), of_rows),
    "a list of both": (Keeps, SharesList, of_rows),
    "the module that it holds": (Accumulates, HoldsModule, of_rows),
}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("writer", WRITERS)
def test_rule_2_a_writer_that_is_seen_to_depend_on_steps_runs_in_stock_order(writer: str) -> None:
    make_module, make_callback, loader = WRITERS[writer]
    assert_hooks_are_stocks(make_module, make_callback, loader, {"hpu_graphs": False, "in_flight": 3})


# What a writer of every day uses


def named(
    self: Any, trainer: Any, module: Any, prediction: Any, indices: Any, batch: Any, batch_idx: int, dl: int
) -> None:
    name = f"{trainer.global_rank}-{batch_idx}-{trainer.predict_dataloaders.dataset.rows.shape}"
    self.seen.append((name, module.device.type, prediction.cpu()))


def decoded(self: Any, trainer: Any, module: Any, prediction: Any, *_: Any) -> None:
    self.seen.extend(module.vocabulary[int(row.argmax())] + module.decode(row) for row in prediction)


def unused(self: Any, *args: Any) -> None:
    self.seen.append(time.monotonic())


class Vocabulary(Net):
    vocabulary = "a", "b", "c"

    def decode(self, row: torch.Tensor) -> str:
        return self.vocabulary[int(row.argmin())]


@pytest.mark.parametrize("write", [named, decoded, unused])
def test_a_writer_that_uses_its_arguments_and_constants_is_late(write: Any) -> None:
    assert may_write_late(reading(write)(), [Vocabulary()], [of_rows()])
