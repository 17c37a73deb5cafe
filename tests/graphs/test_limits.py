"""What captured graphs may cost: how many there are, how much memory they take, and captures that fail."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer import emulator
from tests.graphs.models import (
    BATCHES,
    HPU,
    IN_PLACE,
    Model,
    Network,
    graphed_by,
    graphs_of,
    linear,
    on_host,
    one_warning,
    run,
    sizes,
)
from tests.helpers import Broken, Rows, assert_equal

pytestmark = pytest.mark.usefixtures("emulated")


# How many graphs


IN_TURN = [2, 3, 4, 5] * 8


def test_more_shapes_in_turn_than_max_graphs_are_not_captured_on_and_on() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There are more shapes")
        counts = run(Model(), sizes(*IN_TURN), max_graphs=2)
    assert (counts.captures, counts.evictions) == (2, 0)
    assert counts.replays >= 12


def test_more_shapes_in_turn_than_max_graphs_are_told() -> None:
    with one_warning("more shapes in use than `max_graphs=2`"):
        run(Model(), sizes(*IN_TURN), max_graphs=2)


@pytest.mark.parametrize(
    ("numbers", "limit", "captures", "evictions"),
    [
        ([2, 3, 2] + [3] * 6, 1, 2, 1),
        ([2, 3] * 4 + [4, 5] * 6, 2, 4, 2),
        ([2, 3] * 8, 2, 2, 0),
        ([2, 3] * 4 + [4] + [2, 3] * 4, 2, 2, 0),
    ],
    ids=["one for another", "two for two", "all fit", "a new one"],
)
def test_shapes_that_are_no_longer_in_use_make_room(
    numbers: list[int], limit: int, captures: int, evictions: int
) -> None:
    counts = run(Model(), sizes(*numbers), max_graphs=limit)
    assert (counts.captures, counts.evictions) == (captures, evictions)


@pytest.mark.parametrize("budget", [None, 10**6])
def test_a_memory_budget_that_is_large_enough_drops_nothing(budget: int | None) -> None:
    # The first two make the trace that serves all sizes.
    counts = run(Model(), sizes(3, 2, 2, 3, 3, 4, 4, 5, 5, 2, 2), graph_memory=budget)
    assert (counts.traces, counts.captures, counts.evictions) == (1, 4, 0)


def test_a_small_memory_budget_drops_graphs_and_does_not_capture_them_again() -> None:
    with one_warning("those that were dropped are not captured again"):
        counts = run(Model(), sizes(3, 2, 2, 3, 3, 4, 4, 5, 5, 2, 2, 3, 3, 2, 2), graph_memory=400)
    assert (counts.captures, counts.evictions) == (4, 3)


def test_a_graph_that_exceeds_the_memory_budget_alone_is_given_up() -> None:
    with one_warning("its graph takes .* bytes, and `graph_memory` is 8"):
        counts = run(Model(), graph_memory=8)
    assert (counts.captures, counts.replays) == (0, 0)


# Captures that fail


def test_rule_10_a_capture_that_fails_costs_the_graph_not_the_batch() -> None:
    emulator.uninstall()
    emulator.install(emulator.EmulatorConfig(cpu_fallback_ops=frozenset({"aten::cumsum"})))
    with one_warning("A part of `predict_step` runs without an HPU graph: capturing failed .*cpu fallback"):
        counts = run(Model(lambda n, x: n.linear(x).cumsum(0)))
    assert (counts.captures, counts.replays) == (0, 0)
    assert run(Model()).captures == 1


def test_rule_10_one_shape_that_cannot_be_captured_does_not_cost_the_others_their_graphs() -> None:
    emulator.uninstall()
    emulator.install(emulator.EmulatorConfig(cpu_fallback_ops=frozenset({"aten::cumsum"})))
    function = lambda n, x: n.linear(x).cumsum(0) if len(x) == 3 else n.linear(x)  # noqa: E731
    with one_warning("capturing failed .*cpu fallback"):
        assert run(Model(function), sizes(2, 2, 2, 3, 2, 3, 2, 2, 2)).replays == 5


@pytest.mark.parametrize("function", [linear, *IN_PLACE[:4]])
def test_rule_10_an_error_in_a_capture_leaves_state_as_it_was(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    def fails(function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*tensors: Tensor) -> Any:
            function(*tensors)
            raise Broken("in the capture")

        return broken

    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="Broken: in the capture"):
        graphed_by(fails, patched)
        assert run(Model(function)).captures == 0
    assert run(Model(function)).captures == 1


def test_rule_10_ctrl_c_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def stops(*tensors: Tensor) -> Any:
            function(*tensors)
            raise KeyboardInterrupt

        return stops

    model = nn.Linear(4, 4)
    graphs = graphs_of(model)
    with monkeypatch.context() as patched, torch.inference_mode(), graphs.attached(model) as step:
        graphed_by(interrupted, patched)
        x = Rows().rows[:2].to(HPU)
        step(x)
        with pytest.raises(KeyboardInterrupt):
            step(x)
        # In a dry run that had not ended, the result would be poison.
        assert_equal((x + 1).cpu(), Rows().rows[:2] + 1)
    assert run(Model()).captures == 1


def test_rule_10_an_old_graph_that_becomes_garbage_does_not_end_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the bridge a graph that dies during a capture silently ends it; what is replayed then is nothing."""
    from habana_frameworks.torch.hpu import HPUGraph

    def litters(function: Callable[..., Any]) -> Callable[..., Any]:
        def leaves(*tensors: Tensor) -> Any:
            cycle: list[Any] = [HPUGraph()]
            cycle.append(cycle)
            del cycle
            return function(*tensors)

        return leaves

    graphed_by(litters, monkeypatch)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        assert run(Model()).replays == BATCHES - 2
    finally:
        gc.set_threshold(*threshold)


@pytest.mark.filterwarnings("ignore:.*it records gradients")
@pytest.mark.parametrize("flags", [{}, {"graph_modules": ["network"]}], ids=["step", "network"])
def test_calls_with_gradients_keep_them(flags: dict[str, Any]) -> None:
    def step(network: Network, x: Tensor, i: int) -> Any:
        with torch.enable_grad():
            y = network(x)
        return y.detach(), y.requires_grad, y.grad_fn is not None, network(x)

    model = Model(step=step)
    graphs = graphs_of(model, **flags)
    with torch.no_grad(), graphs.attached(model) as graphed:
        for x in sizes(2, 2, 2, 2):
            found = on_host(graphed(x.to(HPU), 0))
            plain = on_host(model.network(x.to(HPU)))
            assert_equal(found, (plain, True, True, plain))


def test_an_environment_that_would_let_graphs_overwrite_batches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_HPUGRAPH_DISABLE_TENSOR_CACHE", "0")
    with one_warning("PT_HPUGRAPH_DISABLE_TENSOR_CACHE is set to '0'"):
        assert run(Model()).captures == 0
