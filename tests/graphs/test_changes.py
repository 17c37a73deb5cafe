"""Whatever changes after a graph was captured, predictions equal stock Lightning's.

Each change happens before batch 6, between two dataloaders, or between two runs, in lazy and in eager mode.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.graphs.changes import CHANGES, Change, Module
from tests.helpers import assert_equal, installed, predict, rows, trainer

BEFORE = 6
BATCHES = 12


class Before(Callback):
    """Makes a change before one batch."""

    def __init__(self, make: Change, batch: int = BEFORE, loader: int = 0) -> None:
        self.make, self.batch, self.loader = make, batch, loader
        self.cleanup: Any = None

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if (batch_idx, dataloader_idx) == (self.batch, self.loader):
            torch.manual_seed(7)
            self.cleanup = self.make(pl_module)


@contextmanager
def cleaned_up(callback: Before) -> Iterator[None]:
    try:
        yield
    finally:
        if callable(callback.cleanup):
            callback.cleanup()


def predictions(accelerator: Any, make: Change, loaders: Any, batch: int = BEFORE, loader: int = 0) -> Any:
    callback = Before(make, batch, loader)
    with cleaned_up(callback):
        return predict(accelerator, Module().eval(), loaders, callbacks=[callback])


MODES = pytest.mark.parametrize("lazy", [True, pytest.param(False, marks=pytest.mark.full)], ids=["lazy", "eager"])
quiet = pytest.mark.filterwarnings("ignore:.*runs? without")


# Without an emulator, whose moves of modules differ from the CPU's for tensors that were made in inference mode.
@functools.cache
def stock(name: str, batch: int, loader: int) -> Any:
    return predictions("cpu", CHANGES[name], _loaders(loader), batch, loader)


def _loaders(loader: int) -> Any:
    return [rows(12, 2), rows(12, 2)] if loader else rows(2 * BATCHES, 2)


# Habana's lists of ops for autocast are not the CPU's: compared with the same device without graphs.
OTHER_ON_THE_CPU = {"autocast_in_the_step"}


def assert_equals_stock(name: str, lazy: bool, batch: int, loader: int = 0) -> None:
    with installed(lazy=lazy):
        actual = predictions(HPUInferenceAccelerator(), CHANGES[name], _loaders(loader), batch, loader)
        if name in OTHER_ON_THE_CPU:
            plain = HPUInferenceAccelerator(pipelining=False, hpu_graphs=False)
            assert_equal(actual, predictions(plain, CHANGES[name], _loaders(loader), batch, loader))
            return
    expected = stock(name, batch, loader)
    assert_equal(actual, expected)


# The default run has all changes in lazy mode, and these, one of each kind, elsewhere; `make full` has all everywhere.
EACH_KIND = {
    "a string attribute",
    "a float attribute",
    "a function attribute",
    "a value in nested containers",
    "None becomes a tensor",
    "a NumPy array in place",
    "a buffer replaced",
    "a part in train mode",
    "a submodule replaced",
    "another network",
    "a_weight_replaced",
    "a_weight_in_place",
    "the_data_of_a_weight_replaced",
    "a_state_dict_assigned",
    "a_forward_hook",
    "a_global_hook",
    "the_forward_of_a_class",
    "a_parametrization",
    "autocast_in_the_step",
}


def changes(*, all_of: bool = False) -> list[Any]:
    """The names of changes, those of the full run marked."""
    marks = {name: [] if all_of or name in EACH_KIND else [pytest.mark.full] for name in CHANGES}
    return [pytest.param(name, marks=marks[name]) for name in CHANGES]


@quiet
@pytest.mark.parametrize("name", changes(all_of=True))
def test_rule_5_a_change_before_batch_6_equals_stock(name: str) -> None:
    assert_equals_stock(name, True, BEFORE)


@quiet
@pytest.mark.parametrize("name", changes())
def test_rule_5_in_eager_mode_a_change_before_batch_6_equals_stock(name: str) -> None:
    assert_equals_stock(name, False, BEFORE)


BETWEEN_LOADERS = [
    "a string attribute",
    "a buffer replaced",
    "a submodule replaced",
    "the_data_of_a_weight_replaced",
    "a_forward_hook",
    "the_forward_of_a_class",
]


@quiet
@MODES
@pytest.mark.parametrize("name", BETWEEN_LOADERS)
def test_rule_5_a_change_between_dataloaders_equals_stock(name: str, lazy: bool) -> None:
    assert_equals_stock(name, lazy, 0, 1)


def between_runs(accelerator: Any, make: Change) -> list[Any]:
    """Predictions of three runs of one Trainer: before a change, after it, and again."""
    ours, module = trainer(accelerator), Module().eval()
    found = [ours.predict(module, rows(8, 2))]
    torch.manual_seed(7)
    cleanup: Any = make(module)
    try:
        found += [ours.predict(module, rows(8, 2)) for _ in range(2)]
    finally:
        if callable(cleanup):
            cleanup()
    return found


# A plain attribute stays where it is when the model moves, so these cannot be made on the host.
ON_THE_DEVICE = {"None becomes a tensor", "a tensor in a list", "autocast_in_the_step"}


@quiet
@pytest.mark.parametrize("name", [each for each in changes() if each.values[0] not in ON_THE_DEVICE])
@MODES
def test_rule_5_a_change_between_runs_equals_stock(name: str, lazy: bool) -> None:
    expected = between_runs("cpu", CHANGES[name])
    with installed(lazy=lazy):
        assert_equal(between_runs(HPUInferenceAccelerator(), CHANGES[name]), expected)
