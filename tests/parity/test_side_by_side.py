"""Every case on stock Lightning and on the plugin: predictions, hooks, writers, counters, warnings, and graphs.

How flags are chosen: `flags.py` makes sets of them in which every two values of two flags occur together (pairwise),
the defaults first. By default, each case runs with the defaults and with one other set. The cases take the other sets
in turn, so that each set, and with it every pair, occurs with several cases of each module. `make full` (marker `full`)
runs each case with each set, and one case with every combination of the flags that order a batch's way.

What is expected of graphs stands at each case: captures, replays and warnings. TorchDynamo forgets what it has seen
before each run here, since that would change them.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest

from lightning_hpu_infer import InferenceConfig
from tests.parity.cases import CASES, Entry
from tests.parity.flags import ELSEWHERE, SETS, VALUES, changed, pairwise
from tests.parity.recorder import Record, compare, run


@cache
def stock(name: str) -> Record:
    return run("cpu", CASES[name].make)


def chosen() -> Iterator[tuple[str, int]]:
    """The cases of a default run, with the numbers of their sets of flags."""
    for place, name in enumerate(CASES):
        yield name, 0
        yield name, 1 + place % (len(SETS) - 1)


def combinations_of_flags() -> Iterator[Any]:
    by_default = set(chosen())
    for name, number in product(CASES, range(len(SETS))):
        flags = changed(SETS[number])
        marks = [] if (name, number) in by_default else [pytest.mark.full]
        yield pytest.param(name, flags, id=f"{name}-{flags}", marks=marks)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("name", "flags"), list(combinations_of_flags()))
def test_like_stock(name: str, flags: dict[str, Any], device: str) -> None:
    ours = compare(flags, CASES[name].make, stock(name))
    traced = device == "emulator" and flags.get("hpu_graphs", True)
    check_graphs(CASES[name] if traced else None, flags, ours)
    check_warnings(CASES[name].warns if traced else (), flags, ours, stock(name))


def check_graphs(entry: Entry | None, flags: dict[str, Any], ours: Record) -> None:
    """As many graphs as the case says, or none at all."""
    if entry is None:
        assert ours.graphs is None
        return
    assert ours.graphs is not None
    if not flags.keys() & {"max_graphs", "graph_memory", "pad_batch"}:
        # Neither copies nor the pipeline change what is captured.
        assert (ours.graphs.captures, ours.graphs.replays) == (entry.captures, entry.replays), ours.graphs


def check_warnings(expected: tuple[str, ...], flags: dict[str, Any], ours: Record, stock: Record) -> None:
    """Those of stock, those that the case expects, and no others but the one that `max_graphs=1` asks for."""
    own = [text for text in ours.warnings if text not in stock.warnings]
    if "max_graphs" in flags:
        own = [text for text in own if "more shapes in use than `max_graphs=1`" not in text]
    for pattern in expected:
        assert [bool(re.search(pattern, text)) for text in own].count(True) == 1, f"{pattern!r} is not one of {own}"
    assert [text for text in own if not any(re.search(pattern, text) for pattern in expected)] == []


PIPELINE = {name: VALUES[name] for name in ("async_copy", "async_output", "pipelining", "prefetch", "in_flight")}


@pytest.mark.full
@pytest.mark.usefixtures("fresh_dynamo", "device")
@pytest.mark.parametrize("defer_hooks", VALUES["defer_hooks"])
@pytest.mark.parametrize("hpu_graphs", VALUES["hpu_graphs"])
@pytest.mark.parametrize("name", ["several_loaders", "a_fault_in_the_step"])
def test_every_combination_of_the_pipelines_flags(name: str, hpu_graphs: bool, defer_hooks: bool) -> None:
    for values in product(*PIPELINE.values()):
        flags = dict(zip(PIPELINE, values, strict=True)) | {"hpu_graphs": hpu_graphs, "defer_hooks": defer_hooks}
        compare(flags, CASES[name].make, stock(name))


# The selection


def test_there_are_as_many_cases_as_ever() -> None:
    assert len(CASES) >= 79


def test_the_selection_is_pairwise() -> None:
    runs = [SETS[number] for _, number in chosen()]
    for (one, its_values), (other, others) in combinations(VALUES.items(), 2):
        together = {(flags[one], flags[other]) for flags in runs}
        assert together == set(product(its_values, others)), f"{one} and {other}"


def test_every_case_runs_with_the_defaults_and_another_set() -> None:
    for name in CASES:
        numbers = [number for case, number in chosen() if case == name]
        assert numbers[0] == 0
        assert len(set(numbers)) == 2


def test_the_default_run_is_what_was_chosen() -> None:
    unmarked = {param.id for param in combinations_of_flags() if not param.marks}
    assert unmarked == {f"{name}-{changed(SETS[number])}" for name, number in chosen()}


def test_every_flag_is_compared_with_stock_here_or_elsewhere() -> None:
    config = InferenceConfig()
    assert VALUES.keys() | ELSEWHERE.keys() == vars(config).keys()
    assert not VALUES.keys() & ELSEWHERE.keys()
    assert {name: values[0] for name, values in VALUES.items()} == {name: getattr(config, name) for name in VALUES}


def test_pairwise_sets_are_few_and_begin_with_the_defaults() -> None:
    assert SETS[0] == {name: values[0] for name, values in VALUES.items()}
    assert len(SETS) <= 20  # nine is the least there can be: three values by three
    assert pairwise({"a": (0, 1), "b": (0, 1)}) == [{"a": a, "b": b} for a, b in ((0, 0), (0, 1), (1, 0), (1, 1))]
