"""Every case on stock Lightning and on the plugin: predictions, hooks, writers, counters and the module afterwards."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests.helpers import ALL_OFF
from tests.parity.cases import CASES
from tests.parity.recorder import Record, compare, run

FLAGS: list[dict[str, Any]] = [
    {},
    ALL_OFF,
    {"pipelining": False},
    {"hpu_graphs": False},
    {"async_copy": False, "in_flight": 3, "prefetch": 4},
    {"prefetch": 0, "in_flight": 0},
    {"defer_hooks": False},
]

pytestmark = [
    pytest.mark.usefixtures("device"),
    pytest.mark.filterwarnings(
        "ignore:predict returned None",
        "ignore:Couldn't infer the batch indices",
        "ignore:Your `IterableDataset` has `__len__`",
        "ignore:Total length of",
        # Cases use `batch_idx`, count in Python or return nothing. Their predictions and hooks are what is compared.
        "ignore:`predict_step` as a whole runs without a graph",
        "ignore:A part of .* runs without",
        "ignore:The network .* runs without graphs",
        "ignore:You have overridden",
        "ignore:You are trying to `self.log",
    ),
]


@cache
def stock(name: str) -> Record:
    return run("cpu", CASES[name])


def combinations() -> Iterator[Any]:
    """Every case with the default flags and, in turn, one of the others; the rest is marked `full`."""
    for place, name in enumerate(CASES):
        for number, flags in enumerate(FLAGS):
            chosen = number in (0, 1 + place % (len(FLAGS) - 1))
            yield pytest.param(name, flags, id=f"{name}-{flags}", marks=[] if chosen else [pytest.mark.full])


@pytest.mark.parametrize(("name", "flags"), list(combinations()))
def test_like_stock(name: str, flags: dict[str, Any]) -> None:
    compare(flags, CASES[name], stock(name))


def test_there_are_at_least_40_cases() -> None:
    assert len(CASES) >= 40
