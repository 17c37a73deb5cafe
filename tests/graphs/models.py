"""The model that the tests of graphs run, and how its results are compared with plain Python's."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_hpu_infer import InferenceConfig, _habana
from lightning_hpu_infer.graphs import StepGraphs
from lightning_hpu_infer.graphs.counts import GraphCounts
from tests.helpers import assert_equal

HPU = torch.device("hpu", 0)
BATCHES = 12


class Network(nn.Module):
    """A network whose forward is a function; it has state for those that want to change it."""

    total: Tensor
    cache: Tensor
    position: Tensor

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(16, 4))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))
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


# Forwards that write to the buffer `total`.
IN_PLACE: list[Callable[..., Tensor]] = [
    lambda n, x: n.linear(x) + n.total.mul_(0.9).add_(x.sum(0)),
    lambda n, x: n.linear(x) + n.total.copy_(n.total + x.sum(0)),
    lambda n, x: (n.total[:2].add_(1), n.linear(x) + n.total)[1],
    lambda n, x: (torch.add(n.total, x.sum(0), out=n.total), n.linear(x) + n.total)[1],
    lambda n, x: (n.linear(x) + n.total, n.total.add_(1))[0],
]
