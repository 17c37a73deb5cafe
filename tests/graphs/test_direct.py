"""`hpu_graphs="direct"`: named modules in the bridge's own wrapper, without TorchDynamo."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, emulator
from lightning_hpu_infer.graphs import StepGraphs
from lightning_hpu_infer.graphs.counts import GraphCounts
from tests.graphs.models import BATCHES, HPU, Model, Network, on_host, one_warning, sizes
from tests.helpers import Net, assert_equal, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("emulated")


def run(model: Model, batches: list[Tensor] | None = None, **flags: Any) -> GraphCounts:
    """What the graphs of `network` did in a run whose results equal those of plain Python."""
    batches = batches if batches is not None else sizes(*[2] * BATCHES)
    plain = copy.deepcopy(model).eval()
    config = InferenceConfig(hpu_graphs="direct", graph_modules=["network"], **flags)
    graphs = StepGraphs(model.to(HPU).eval(), HPU, config, "direct")
    with torch.inference_mode(), graphs.attached(model.forward) as step:
        found = [step(batch.to(HPU), i) for i, batch in enumerate(batches)]
        assert_equal(on_host(found), [plain(batch, i) for i, batch in enumerate(batches)])
    return graphs.counts


def test_each_layout_is_captured_once_and_nothing_is_traced() -> None:
    counts = run(Model(), sizes(*([2, 3, 2] * 4)))
    assert (counts.traces, counts.captures, counts.replays, counts.verified) == (0, 2, BATCHES - 2, 0)


@pytest.mark.parametrize(
    "step",
    [
        lambda n, x, i: n(x[:1]),
        lambda n, x, i: n(x.repeat(2, 1).t()),
        lambda n, x, i: (n(x), n(x + 1), n(x)),
        lambda n, x, i: n(x) + i,
        lambda n, x, i: (n(x), x.add_(1), n(x))[::2],
    ],
)
def test_rule_4_results_and_batches_are_the_callers(step: Any) -> None:
    counts = run(Model(step=step))
    assert counts.captures == 1
    assert counts.replays >= BATCHES - 1


def test_results_may_be_containers_with_constants() -> None:
    def several(network: Network, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        return {"a": (network.linear(x) * scale, 3), "b": [x + 1, None, "text", torch.float32]}

    model = Model(several, lambda n, x, i: (n(x), n(x, scale=2.0)))
    assert run(model).captures == 2


def test_the_same_tensor_twice_is_right() -> None:
    add = lambda n, a, b: n.linear(a) * b  # noqa: E731
    run(Model(add, lambda n, x, i: n(x, x) if i % 3 else n(x, x + 1)))


def test_constants_and_modes_are_told_apart() -> None:
    scaled = lambda n, x, factor: n.linear(x) * factor + n.training  # noqa: E731
    counts = run(Model(scaled, lambda n, x, i: (n(x, 1), n(x, 1.0), n(x, True), n(x, 2))))
    assert counts.captures == 4


class Odd:
    """Nothing that is known of."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_results_that_are_unknown_are_refused_in_words() -> None:
    model = Model(lambda n, x: Odd(n.linear(x)), lambda n, x, i: n(x).x)
    with pytest.raises(TypeError, match="tuples, lists and dicts, and Network returns a Odd"):
        run(model)
    # The device is of use afterwards.
    assert run(Model()).captures == 1


def test_arguments_that_are_unknown_run_plainly() -> None:
    counts = run(Model(lambda n, odd: n.linear(odd.x), lambda n, x, i: n(Odd(x))))
    assert (counts.captures, counts.plain_calls) == (0, BATCHES)


def test_more_layouts_than_max_graphs_run_plainly() -> None:
    with one_warning("more layouts in use than `max_graphs=2`"):
        counts = run(Model(), sizes(*([2, 3, 4, 5] * 3)), max_graphs=2)
    assert (counts.captures, counts.replays, counts.plain_calls) == (2, 4, 6)


def test_rule_10_an_error_in_a_capture_is_the_users() -> None:
    model = Model(lambda n, x: n.linear(x[:, :3]))
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        run(model)
    assert run(Model()).captures == 1


def test_it_needs_names() -> None:
    for names in ({}, {"graph_modules": "blocks"}):
        with pytest.raises(ValueError, match="captures only modules that you name: pass `graph_modules="):
            InferenceConfig(hpu_graphs="direct", **names)  # type: ignore[arg-type]


def test_a_trainer_may_use_it_and_see_new_weights_in_the_next_run() -> None:
    module: Any = Net()
    ours = trainer(HPUInferenceAccelerator(hpu_graphs="direct", graph_modules=["net"]))
    for change in (0.0, 1.0):
        module.load_state_dict({name: tensor + change for name, tensor in module.state_dict().items()})
        expected = predict("cpu", copy.deepcopy(module), rows(12, 2))
        assert_equal(ours.predict(module, rows(12, 2)), expected)
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}
    assert emulator.stats().captures == 2
    assert isinstance(module.net, nn.Sequential)
    assert module.net._compiled_call_impl is None
