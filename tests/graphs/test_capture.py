"""One traced graph as HPU graphs: what replays are given, what they leave, and what captures may cost."""

import copy
import gc
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_hpu_infer import InferenceConfig, _habana, emulator
from lightning_hpu_infer.graphs import StepGraphs
from lightning_hpu_infer.graphs.counts import GraphCounts
from tests.helpers import Broken, Rows, assert_equal

pytestmark = pytest.mark.usefixtures("emulated")
HPU = torch.device("hpu", 0)
BATCHES = 12


class Network(nn.Module):
    """A network whose forward is a function; it has state for those that want to change it."""

    total: Tensor
    cache: Tensor
    place: Tensor

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(16, 4))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))
        self.listed: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def linear(network: Network, x: Tensor) -> Tensor:
    return network.linear(x)


class Model(nn.Module):
    """Its step is a function of the network, the batch and the batch's number."""

    def __init__(self, function: Callable[..., Any] = linear, step: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.network = Network(function)
        self.step = step or (lambda network, x, i: network(x))

    def forward(self, x: Tensor, i: int) -> Any:
        return self.step(self.network, x, i)


def sizes(*numbers: int) -> list[Tensor]:
    """Batches of so many rows."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=generator) for n in numbers]


def on_host(results: Any) -> Any:
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, results)


def run(model: Model, batches: Sequence[Tensor] | None = None, **flags: Any) -> GraphCounts:
    """What the graphs did in a run whose results, and whose batches afterwards, equal those of plain Python."""
    batches = batches if batches is not None else sizes(*[2] * BATCHES)
    plain, graphs = copy.deepcopy(model).cpu().eval(), graphs_of(model, **flags)
    expected, found = [], []
    # As `predict_step` is called: not as a module.
    with torch.inference_mode(), graphs.attached(model.forward) as step:
        kept = [batch.clone() for batch in batches], [batch.to(HPU) for batch in batches]
        for i in range(len(batches)):
            expected.append(plain(kept[0][i], i))
            found.append(step(kept[1][i], i))
        # Not before the end: what a later replay overwrote is found then.
        assert_equal(on_host([found, kept[1]]), [expected, kept[0]])
    return graphs.counts


def graphs_of(model: nn.Module, **flags: Any) -> StepGraphs:
    """The graphs of a model, which is moved to the device."""
    return StepGraphs(model.to(HPU).eval(), HPU, InferenceConfig(**flags), "hpu_graph")


@contextmanager
def one_warning(match: str) -> Iterator[None]:
    with pytest.warns(UserWarning, match=match) as found:
        yield
    assert len(found) == 1


def graphed_by(make: Callable[[Callable[..., Any]], Callable[..., Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every captured function pass through `make` before the bridge gets it."""
    original = _habana.graphed
    monkeypatch.setattr(_habana, "graphed", lambda function: original(make(function)))


# Whose memory it is


@pytest.mark.parametrize("flags", [{}, {"graph_modules": ["network"]}], ids=["step", "network"])
def test_rule_4_results_are_not_overwritten_by_the_next_replay(flags: dict[str, Any]) -> None:
    def views(network: Network, x: Tensor, i: int) -> Any:
        scores = network(x)
        return scores, scores.detach(), scores[:, 0], [scores, x.view(-1)]

    assert run(Model(step=views), **flags).replays == BATCHES - 2


STEPS: dict[str, Callable[..., Any]] = {
    "the batch": lambda n, x, i: n(x),
    "a view": lambda n, x, i: n(x.view(4, 2).view(2, 4)),
    "a part": lambda n, x, i: n(x[:1]),
    "another shape": lambda n, x, i: n(x.unsqueeze(0)),
    "transposed": lambda n, x, i: n(x.repeat(2, 1).t()),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("flags", [{}, {"graph_modules": ["network"]}], ids=["step", "network"])
def test_rule_4_no_batch_is_a_static_input(step: str, flags: dict[str, Any]) -> None:
    """The other cache mode of the bridge would overwrite the first captured batch with every later one."""
    counts = run(Model(step=STEPS[step]), **flags)
    assert (counts.captures, counts.replays) == (1, BATCHES - 2)


def add(network: Network, a: Tensor, b: Tensor) -> Tensor:
    return network.linear(a) * b


# The tensors of one call: the same one twice, detached ones, views of one another, changing in the course of a run.
ALIASES: list[Callable[[Network, Tensor, int], Any]] = [
    lambda n, x, i: n(x, x) if i > 5 else n(x, 2 * x + 1),
    lambda n, x, i: n(x, 2 * x + 1) if i > 5 else n(x, x),
    lambda n, x, i: (n(x, x), n(x, 2 * x + 1), n(x + 1, x)),
    lambda n, x, i: n(x, x.detach()) if i > 5 else n(x, x + 1),
    lambda n, x, i: n(x, x.view(2, 4)) if i < 5 else n(x, (x + 1).view(2, 4)),
    lambda n, x, i: n(x.view(2, 4), x.view(2, 4)) if i < 5 else n(x, x + 3),
]


@pytest.mark.parametrize("step", ALIASES)
@pytest.mark.filterwarnings("ignore:`predict_step` as a whole")
def test_rule_4_tensors_that_share_memory_are_told_apart(step: Callable[..., Any]) -> None:
    assert run(Model(add, step)).replays > 0
    assert run(Model(add, step), graph_modules=["network"]).replays > 0


def test_rule_4_one_graph_whatever_the_offset_of_a_view() -> None:
    wide = list((torch.arange(24 * 30.0).reshape(24, 30) / 100).split(2))
    counts = run(Model(step=lambda n, x, i: n(x[:, i : i + 4])), wide, graph_modules=["network"], max_graphs=1)
    assert (counts.traces, counts.captures) == (1, 1)


# State that is written to


def _batch_norm(network: Network, x: Tensor) -> Tensor:
    return network.norm.train()(network.linear(x)) + network.norm.running_mean


def _cached(network: Network, x: Tensor) -> Tensor:
    network.cache.index_copy_(0, network.place, network.linear(x).sum(0, keepdim=True))
    network.place += 1
    return network.cache.sum(0) + x


def _listed(network: Network, x: Tensor) -> Tensor:
    if not network.listed:
        network.listed, network.named = [network.total], {"cache": network.cache}
    network.listed[0].mul_(0.9).add_(x.sum(0))
    network.named["cache"][0] += 1
    return network.linear(x) * network.listed[0] + network.named["cache"][0]


def _replaced(network: Network, x: Tensor) -> Tensor:
    network.total = network.total + x.sum(0)
    return network.linear(x) + network.total


STATES: list[Any] = [
    lambda n, x: n.linear(x) + n.total.mul_(0.9).add_(x.sum(0)),
    lambda n, x: n.linear(x) + n.total.copy_(n.total + x.sum(0)),
    lambda n, x: (n.total[:2].add_(1), n.linear(x) + n.total)[1],
    lambda n, x: (torch.add(n.total, x.sum(0), out=n.total), n.linear(x) + n.total)[1],
    lambda n, x: (n.linear(x) + n.total, n.total.add_(1))[0],
    _cached,
    _listed,
]


@pytest.mark.parametrize(
    ("function", "verify"),
    [
        *((function, verify) for function in STATES for verify in (0, 1, 3)),
        (_batch_norm, 0),
        (_batch_norm, 1),
        (_batch_norm, 3),
    ],
)
def test_rule_5_state_in_place_is_changed_once_per_batch(function: Any, verify: int) -> None:
    counts = run(Model(function), verify_graphs=verify)
    assert (counts.captures, counts.replays) == (1, BATCHES - 2)


def _changed(network: Network, x: Tensor) -> Tensor:
    x[:, 0] += 1
    return network.linear(x)


def _kept(network: Network, x: Tensor) -> Tensor:
    y = network.linear(x)
    network.listed = [y if not network.listed else y + network.listed[0]]
    return network.listed[0] + 1


CHANGING: list[Any] = [
    (_replaced, lambda n, x, i: n(x)),
    (_kept, lambda n, x, i: n(x)),
    (_changed, lambda n, x, i: (n(x), x)),
    (_changed, lambda n, x, i: (lambda y: (n(y), y))(x.clone())),
    (linear, lambda n, x, i: n(x.add_(1))),
    (linear, lambda n, x, i: (n(x), x.add_(1), n(x))[::2]),
]


@pytest.mark.parametrize(("function", "step"), CHANGING)
@pytest.mark.parametrize("flags", [{}, {"verify_graphs": 0}, {"graph_modules": ["network"]}], ids=str)
def test_rule_5_tensors_that_are_replaced_or_changed_are_followed(
    function: Any, step: Any, flags: dict[str, Any]
) -> None:
    run(Model(function, step), **flags)


@pytest.mark.parametrize(("function", "step"), [CHANGING[0], CHANGING[1], CHANGING[2]])
def test_rule_9_tensors_that_are_new_in_every_batch_do_not_let_graphs_pile_up(function: Any, step: Any) -> None:
    assert run(Model(function, step), sizes(*[2] * 30)).captures <= 8


def test_a_sum_in_a_batch_of_its_own_is_captured_once() -> None:
    counts = run(Model(step=lambda n, x, i: n(x.clone().add_(1).mul_(2))))
    assert (counts.captures, counts.replays) == (1, BATCHES - 2)


# Verification


@pytest.mark.parametrize(("verify", "wrong"), [(1, 1), (1, 2), (3, 1), (3, 4)])
@pytest.mark.parametrize("function", [linear, STATES[0]], ids=["pure", "with state"])
def test_a_wrong_replay_is_found_and_costs_the_graph_only(
    monkeypatch: pytest.MonkeyPatch, verify: int, wrong: int, function: Any
) -> None:
    """Both the capturing call and later replays are compared."""
    original = _habana.graphed

    def graphed(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        wrapped, calls = original(function), []

        def replay(*tensors: Tensor) -> list[Tensor]:
            calls.append(1)
            return [result + 0.5 * (len(calls) == wrong) for result in wrapped(*tensors)]

        return replay

    monkeypatch.setattr(_habana, "graphed", graphed)
    with one_warning("without an HPU graph: a replay differs .*largest difference 0.5.*" + re.escape(__file__)):
        counts = run(Model(function), verify_graphs=verify)
    assert (counts.captures, counts.verified) == (1, wrong)


def test_without_verification_a_graph_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_habana, "graphed", lambda function: lambda *tensors: [each * 2 for each in function(*tensors)])
    model, x = Model(), sizes(2)[0].to(HPU)
    graphs = graphs_of(model, verify_graphs=0)
    with torch.inference_mode(), graphs.attached(model) as step:
        first, *others = (step(x, i).cpu() for i in range(4))
    assert_equal(others, [first * 2] * 3)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_verified_replays_are_counted(number: int) -> None:
    assert run(Model(), verify_graphs=number).verified == (number + 1 if number else 0)


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
    ids=["one for another", "two for two", "all fit", "a stranger"],
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


@pytest.mark.parametrize("function", [linear, *STATES[:4]])
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
        # A dry run that was still on would answer with poison.
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
