"""One traced graph as HPU graphs: what replays are given, what they leave, and how they are verified."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpu_infer import _habana
from tests.graphs import models
from tests.graphs.models import BATCHES, HPU, IN_PLACE, Model, Network, graphs_of, linear, one_warning, run, sizes
from tests.helpers import assert_equal

pytestmark = pytest.mark.usefixtures("emulated")


# Ownership of memory


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
    network.cache.index_copy_(0, network.position, network.linear(x).sum(0, keepdim=True))
    network.position += 1
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


STATES: list[Any] = [*IN_PLACE, _cached, _listed]


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
    with one_warning("without an HPU graph: a replay differs .*largest difference 0.5.*" + re.escape(models.__file__)):
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
