"""One traced graph as HPU graphs: what replays are given, what they leave, and what captures may cost."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, _habana, emulator
from lightning_hpu_infer.graphs import StepGraphs
from lightning_hpu_infer.graphs.counts import GraphCounts
from tests.helpers import Broken, BrokenStep, Net, Rows, assert_equal, installed, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("emulated")
BATCHES = 12


class Network(nn.Module):
    """A network whose forward is a function; it has state for those that want to change it."""

    total: Tensor
    cache: Tensor

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

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


class Module(Net):
    """Its step is a function of the network, the batch and nothing else."""

    def __init__(self, function: Callable[..., Any], step: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.network = Network(function)
        self.step = step or (lambda network, x: network(x))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(self.network, batch)


def linear(network: Network, x: Tensor) -> Tensor:
    return network.linear(x)


def sizes(*numbers: int) -> Any:
    """Batches of so many rows."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader([torch.randn(n, 4, generator=generator) for n in numbers], batch_size=None)  # type: ignore[arg-type]


def run(module: Net, loader: Any = None, **flags: Any) -> GraphCounts:
    """What the graphs did in a run whose predictions equal stock's."""
    loader = loader if loader is not None else rows(2 * BATCHES, 2)
    expected = predict("cpu", copy.deepcopy(module), loader)
    ours = trainer(HPUInferenceAccelerator(**flags))
    assert_equal(ours.predict(module, loader), expected)
    loop: Any = ours.predict_loop
    return loop._graphs.counts


def graphed_by(make: Callable[[Callable[..., Any]], Callable[..., Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every captured function pass through `make` before the bridge gets it."""
    original = _habana.graphed
    monkeypatch.setattr(_habana, "graphed", lambda function: original(make(function)))


# Whose memory it is


def test_rule_4_results_are_not_overwritten_by_the_next_replay() -> None:
    class Keeps(Module):
        kept: tuple[list[Tensor], ...] = ([], [], [])

        def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            for kept, tensor in zip(self.kept, (outputs, outputs.detach(), outputs[:, 0]), strict=True):
                kept.append(tensor)

    module = Keeps(linear)
    expected = predict("cpu", Module(linear), rows(24, 2))
    predict(HPUInferenceAccelerator(defer_hooks=False), module, rows(24, 2))
    found = [[tensor.cpu() for tensor in kept] for kept in module.kept]
    assert_equal(found, [expected, expected, [scores[:, 0] for scores in expected]])


STEPS: dict[str, Callable[..., Any]] = {
    "the batch": lambda n, x: n(x),
    "a view": lambda n, x: n(x.view(2, 4)),
    "a part": lambda n, x: n(x[:1]),
    "another shape": lambda n, x: n(x.unsqueeze(0)),
    "in place afterwards": lambda n, x: (n(x), x.add_(1), n(x))[::2],
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("flags", [{}, {"graph_modules": ["network"]}], ids=["step", "network"])
def test_rule_4_no_batch_is_a_static_input(step: str, flags: dict[str, Any]) -> None:
    class KeepsBatches(Module):
        kept: list[Tensor]

        def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.kept.append(batch)

    module = KeepsBatches(linear, STEPS[step])
    module.kept = []
    counts = run(module, **flags)
    assert counts.captures >= 1
    assert counts.replays > 0
    expected = [batch + (step == "in place afterwards") for batch in rows(24, 2)]
    assert_equal([batch.cpu() for batch in module.kept[12:]], expected)


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
    lambda n, x, i: n(torch.cat([x, x], 1)[:, i % 3 : i % 3 + 4], x),
]


@pytest.mark.parametrize("step", ALIASES)
def test_rule_4_tensors_that_share_memory_are_told_apart(step: Callable[..., Any]) -> None:
    class Counted(Module):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return step(self.network, batch, batch_idx)

    assert run(Counted(add), graph_modules=["network"]).replays > 0


def test_rule_4_one_graph_whatever_the_offset_of_a_view() -> None:
    class Slices(Module):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.network(batch[:, batch_idx : batch_idx + 4])

    wide = torch.arange(24 * 30.0).reshape(24, 30) / 100
    counts = run(Slices(linear), DataLoader(wide, 2), graph_modules=["network"], max_graphs=1)  # type: ignore[arg-type]
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


batch_norm = pytest.param(
    _batch_norm,
    marks=pytest.mark.xfail(strict=True, reason="the schema of batch_norm does not tell that it writes its statistics"),
)
STATES: list[Any] = [
    lambda n, x: n.linear(x) + n.total.mul_(0.9).add_(x.sum(0)),
    lambda n, x: n.linear(x) + n.total.copy_(n.total + x.sum(0)),
    lambda n, x: (n.total[:2].add_(1), n.linear(x) + n.total)[1],
    lambda n, x: (torch.add(n.total, x.sum(0), out=n.total), n.linear(x) + n.total)[1],
    lambda n, x: (n.linear(x) + n.total, n.total.add_(1))[0],
    _cached,
    _listed,
]


@pytest.mark.parametrize("verify", [0, 1, 3])
@pytest.mark.parametrize("function", [*STATES, batch_norm])
def test_rule_5_state_in_place_is_changed_once_per_batch(function: Any, verify: int, request: Any) -> None:
    if function is _batch_norm and verify == 0:
        request.applymarker(pytest.mark.xfail(False, reason=""))
    counts = run(Module(function), verify_graphs=verify)
    assert (counts.captures, counts.replays) == (1, BATCHES - 2)


@pytest.mark.parametrize("verify", [0, 1])
def test_rule_5_tensors_that_the_network_replaces_are_followed(verify: int) -> None:
    run(Module(_replaced), verify_graphs=verify)


def test_rule_5_an_input_that_a_network_changes_is_changed_once() -> None:
    def change(network: Network, x: Tensor) -> Tensor:
        x[:, 0] += 1
        return network.linear(x)

    run(Module(change, lambda n, x: (lambda y: (n(y), y))(x.clone())))
    run(Module(change, lambda n, x: (n(x), x)))
    run(Module(change, lambda n, x: (lambda y: (n(y), y))(x.clone())), graph_modules=["network"])


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
    with pytest.warns(UserWarning, match="without an HPU graph: a replay differs .*largest difference 0.5") as warnings:
        counts = run(Module(function), verify_graphs=verify)
    assert len(warnings) == 1
    assert (counts.captures, counts.verified) == (1, wrong)


def test_without_verification_a_graph_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = _habana.graphed
    monkeypatch.setattr(
        _habana, "graphed", lambda function: lambda *tensors: [each * 2 for each in original(function)(*tensors)]
    )
    expected = predict("cpu", Module(linear), rows(24, 2))
    actual = predict(HPUInferenceAccelerator(verify_graphs=0), Module(linear), rows(24, 2))
    assert_equal(actual[:1] + actual[2:], expected[:1] + [2 * each for each in expected[2:]])


@pytest.mark.parametrize("number", [0, 1, 3])
def test_verified_replays_are_counted(number: int) -> None:
    assert run(Module(linear), verify_graphs=number).verified == (number + 1 if number else 0)


# How many graphs


def test_more_shapes_in_turn_than_max_graphs_are_not_captured_on_and_on() -> None:
    with pytest.warns(UserWarning, match="more shapes in use than `max_graphs=2`") as warnings:
        counts = run(Module(linear), sizes(*([2, 3, 4, 5] * 10)), max_graphs=2)
    assert len(warnings) == 1
    assert counts.captures <= 3
    assert counts.replays >= 12


@pytest.mark.parametrize(
    ("numbers", "captures", "evictions"),
    [
        ([2] * 6 + [3] * 6, 2, 1),
        ([2, 3] * 4 + [4, 5] * 6, 4, 2),
        ([2, 3] * 8, 2, 0),
    ],
)
def test_shapes_that_are_no_longer_in_use_make_room(numbers: list[int], captures: int, evictions: int) -> None:
    counts = run(Module(linear), sizes(*numbers), max_graphs=1 + (evictions != 1))
    assert (counts.captures, counts.evictions) == (captures, evictions)


@pytest.mark.parametrize(("budget", "evictions"), [(None, 0), (200, 1), (10**6, 0)])
def test_a_memory_budget_drops_the_graphs_that_were_used_least_recently(budget: int | None, evictions: int) -> None:
    counts = run(Module(linear), sizes(*([1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [1])), graph_memory=budget)
    assert (counts.captures >= 4, counts.evictions >= evictions) == (True, True)
    assert counts.evictions or not evictions


def test_a_graph_that_exceeds_the_memory_budget_alone_is_given_up() -> None:
    with pytest.warns(UserWarning, match="its graph alone takes .* bytes, and `graph_memory` is 8"):
        counts = run(Module(linear), graph_memory=8)
    assert (counts.captures, counts.replays) == (0, 0)


# Captures that fail


def test_rule_10_a_capture_that_fails_costs_the_graph_not_the_batch() -> None:
    emulator.uninstall()
    with installed(cpu_fallback_ops=frozenset({"aten::cumsum"})):
        module = Module(lambda n, x: n.linear(x).cumsum(0))
        with pytest.warns(UserWarning, match="capturing failed .*cpu fallback") as warnings:
            counts = run(module)
        assert (len(warnings), counts.captures) == (1, 0)
        assert run(Module(linear)).captures == 1
    emulator.install(emulator.EmulatorConfig())


@pytest.mark.parametrize("function", [linear, *STATES[:4]])
def test_rule_10_an_error_in_a_capture_leaves_state_as_it_was(
    monkeypatch: pytest.MonkeyPatch, function: Any
) -> None:
    def fails(function: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*tensors: Tensor) -> Any:
            function(*tensors)
            raise Broken("in the capture")

        return broken

    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="Broken: in the capture"):
        graphed_by(fails, patched)
        assert run(Module(function)).captures == 0
    assert run(Module(function)).captures == 1


def test_rule_10_ctrl_c_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(function: Callable[..., Any]) -> Callable[..., Any]:
        def stops(*tensors: Tensor) -> Any:
            function(*tensors)
            raise KeyboardInterrupt

        return stops

    model = nn.Linear(4, 4).to("hpu").eval()
    graphs = StepGraphs(model, torch.device("hpu", 0), InferenceConfig(), "hpu_graph")
    with monkeypatch.context() as patched, torch.inference_mode(), graphs.attached(model) as step:
        graphed_by(interrupted, patched)
        x = Rows().rows[:2].to("hpu")
        step(x)
        with pytest.raises(KeyboardInterrupt):
            step(x)
        # A dry run that was still on would answer with poison.
        assert_equal((x + 1).cpu(), Rows().rows[:2] + 1)
    assert run(Module(linear)).captures == 1


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
        assert run(Module(linear)).replays == BATCHES - 2
    finally:
        gc.set_threshold(*threshold)


@pytest.mark.parametrize("flags", [{}, {"graph_modules": ["network"]}], ids=["step", "network"])
def test_calls_with_gradients_keep_them(flags: dict[str, Any]) -> None:
    def step(network: Network, x: Tensor) -> Any:
        with torch.enable_grad():
            y = network(x)
        return y.detach(), y.requires_grad, network(x)

    expected = predict("cpu", Module(linear, step), rows(24, 2), inference_mode=False)
    with pytest.warns(UserWarning, match="records gradients") if not flags else pytest.MonkeyPatch.context():
        actual = predict(HPUInferenceAccelerator(**flags), Module(linear, step), rows(24, 2), inference_mode=False)
    assert_equal(actual, expected)
    assert {requires for _, requires, _ in actual} == {True}


def test_an_environment_that_would_let_graphs_overwrite_batches_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_HPUGRAPH_DISABLE_TENSOR_CACHE", "0")
    with pytest.warns(UserWarning, match="PT_HPUGRAPH_DISABLE_TENSOR_CACHE is set to '0'"):
        assert run(Module(linear)).captures == 0


# Memory


def bytes_left() -> int:
    gc.collect()
    return emulator.stats().bytes_in_use


@pytest.mark.parametrize("flags", [{}, {"in_flight": 3}, {"pipelining": False}, {"graph_modules": ["net"]}], ids=str)
def test_rule_11_no_device_memory_is_left(flags: dict[str, Any]) -> None:
    predict(HPUInferenceAccelerator(**flags), Net(), rows(21, 2))
    assert bytes_left() == 0
    with pytest.raises(Broken):
        predict(HPUInferenceAccelerator(**flags), BrokenStep(), rows(20, 2))
    assert bytes_left() == 0


def test_another_kind_of_run_releases_the_graphs_without_the_garbage_collector() -> None:
    class Tested(Net):
        def test_step(self, batch: Tensor, batch_idx: int) -> None: ...

    one, module = trainer(HPUInferenceAccelerator()), Tested()
    one.predict(module, rows(12, 2))
    gc.collect()
    gc.disable()
    try:
        assert emulator.stats().bytes_in_use > 0
        one.test(module, rows(2, 2), verbose=False)
        assert emulator.stats().bytes_in_use == 0
    finally:
        gc.enable()


def test_rule_9_device_memory_is_bounded_whatever_the_number_of_batches() -> None:
    peaks = []
    for batches in (20, 200):
        emulator.reset_stats()
        trainer(HPUInferenceAccelerator()).predict(Net(), rows(2 * batches, 2), return_predictions=False)
        peaks.append(emulator.stats().peak_bytes)
    # A queue without a bound would hold the 180 further batches; when the device frees a few of them is its affair.
    batch_bytes = 4 * (2 * 4 + 2 * 3)
    assert peaks[1] - peaks[0] < 12 * batch_bytes
