"""Networks that a graph would get wrong on the bridge, mostly without an error: predictions equal stock's."""

import copy
import re
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.helpers import Net, Rows, assert_equal, assert_like_stock, predict, rows

pytestmark = pytest.mark.usefixtures("emulated")


class Network(nn.Module):
    """A network whose forward is a function; it has state for those that want to change it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 4)
        self.function = function
        self.cache: Any = None
        self.scale = 1.0
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Module(Net):
    def __init__(self, function: Callable[..., Any], step: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.network = Network(function)
        self.step = step or (lambda network, x, i: network(x))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(self.network, batch, batch_idx)


def graphed(module: Net, loader: Any = None, **flags: Any) -> emulator.EmulatorStats:
    """Counters of a run whose predictions equal stock's."""
    loader = loader if loader is not None else rows(24, 2)
    expected = predict("cpu", copy.deepcopy(module), loader)
    emulator.reset_stats()
    assert_equal(predict(HPUInferenceAccelerator(**flags), module, loader), expected)
    return emulator.stats()


def add(network: Network, a: Tensor, b: Tensor) -> Tensor:
    return network.linear(a) * b


# The inputs of one call: the same tensor twice, a detached one, views of one another, in turn.
ALIASES: list[Callable[[Network, Tensor, int], Any]] = [
    lambda n, x, i: n(x, x) if i % 2 else n(x, 2 * x + 1),
    lambda n, x, i: n(x, 2 * x + 1) if i % 2 else n(x, x),
    lambda n, x, i: (n(x, x), n(x, 2 * x + 1), n(x + 1, x)),
    lambda n, x, i: n(x, x.detach()) if i % 2 else n(x, x + 1),
    lambda n, x, i: n(x, x.view(2, 4)) if i < 5 else n(x, (x + 1).view(2, 4)),
    lambda n, x, i: n(x.view(2, 4), x.view(2, 4)) if i < 5 else n(x, x + 3),
]


@pytest.mark.parametrize("step", ALIASES)
def test_rule_4_aliased_arguments_are_told_apart(step: Callable[..., Any]) -> None:
    assert graphed(Module(add, step)).replays > 0


RETURNS: dict[str, Callable[..., Any]] = {
    "the input": lambda n, x: (n.linear(x), x),
    "a detached input": lambda n, x: (n.linear(x), x.detach()),
    "a view of the input": lambda n, x: (n.linear(x), x.view(4, 2), x[:, 1:], x.t()),
    "a view of a result": lambda n, x: n.linear(x)[:, ::2],
    "a result twice": lambda n, x: [n.linear(x)] * 2,
    "a result and its view": lambda n, x: (lambda y: {"y": y, "first": y[0]})(n.linear(x)),
    "a weight": lambda n, x: (n.linear(x), n.linear.weight.detach(), n.linear.bias.detach()),
    "only the input": lambda n, x: x,
}


@pytest.mark.parametrize("returns", RETURNS)
def test_rule_3_a_network_that_hands_back_what_it_was_given(returns: str) -> None:
    assert graphed(Module(RETURNS[returns])).replays > 0


def grow(network: Network, x: Tensor) -> Tensor:
    if network.cache is None or len(network.cache) < len(x):
        network.cache = torch.arange(len(x) * 4, device=x.device, dtype=x.dtype).reshape(-1, 4)
    return network.linear(x) + network.cache[: len(x)]


def test_a_cache_that_the_network_grows_is_not_part_of_a_graph() -> None:
    sizes = [2, 2, 3, 2, 3, 5, 2, 5, 3, 5, 2, 3]
    batches = [torch.full((size, 4), float(i)) for i, size in enumerate(sizes)]
    assert graphed(Module(grow), DataLoader(batches, batch_size=None)).captures > 0  # type: ignore[arg-type]


def branch(network: Network, x: Tensor) -> Tensor:
    out: Tensor = network.linear(x)
    return out if x.sum().item() > 40 else -out


def mask(network: Network, x: Tensor) -> Tensor:
    out: Tensor = network.linear(x)
    out[x > 5] = 0
    return out


READS: dict[str, tuple[Callable[..., Any], str]] = {
    "item": (branch, "it reads values of the device"),
    "bool": (lambda n, x: n.linear(x) if (x > 5).any() else n.linear(x) + 1, "it reads values of the device"),
    "mask": (mask, "it indexes with a mask"),
    "selection": (lambda n, x: n.linear(x)[x > 5], "it indexes with a mask"),
    "nonzero": (lambda n, x: (n.linear(x), x.nonzero()), "it reads values of the device"),
    "to the host": (lambda n, x: n.linear(x) + x.cpu().mean(), "it copies between host and device"),
    "from the host": (lambda n, x: n.linear(x) + torch.ones(4).to(x.device), "it copies between host and device"),
    "in place": (lambda n, x: n.linear(x.add_(1)), "it changes its input in place"),
}


@pytest.mark.parametrize("read", READS)
def test_a_network_that_reads_the_device_is_not_captured_and_its_line_is_named(read: str) -> None:
    function, reason = READS[read]
    here = re.escape(__file__)
    with pytest.warns(UserWarning, match=rf"`network` runs without an HPU graph: {reason}.*{here}:\d+"):
        assert graphed(Module(function)).captures == 0


def count(network: Network, x: Tensor) -> Tensor:
    network.calls += 1
    return network.linear(x) * network.calls


def scale(network: Network, x: Tensor) -> Tensor:
    return network.linear(x) * network.scale


def scaled_step(network: Network, x: Tensor, i: int) -> Any:
    network.scale = float(i)
    return network(x)


def test_a_python_counter_in_the_network_is_found_by_the_comparison() -> None:
    module = Module(count)
    expected = predict("cpu", module, rows(24, 2))
    module.network.calls = 0
    with pytest.warns(UserWarning, match="`network` runs without an HPU graph: a replay differs .*largest difference"):
        actual = predict(HPUInferenceAccelerator(), module, rows(24, 2))
    # The comparison itself calls the network, so the counter runs ahead once a plain call and its graph were made.
    assert_equal(actual[:3], expected[:3])


def test_a_value_that_the_step_sets_for_every_batch_is_found_by_the_comparison() -> None:
    with pytest.warns(UserWarning, match="a replay differs from the plain forward"):
        graphed(Module(scale, scaled_step))


def test_random_numbers_in_the_network_are_found_by_the_comparison() -> None:
    module = Module(lambda n, x: n.linear(x) + torch.rand_like(x))
    with pytest.warns(UserWarning, match="a replay differs from the plain forward"):
        predict(HPUInferenceAccelerator(), module, rows(24, 2))


def test_without_verification_a_graph_is_believed() -> None:
    module = Module(scale, scaled_step)
    expected = predict("cpu", module, rows(24, 2))
    actual = predict(HPUInferenceAccelerator(verify_graphs=0), module, rows(24, 2))
    assert not torch.allclose(actual[-1], expected[-1])


def test_forward_hooks_of_a_part_are_found_before_the_capture() -> None:
    seen: list[int] = []
    module = Module(lambda n, x: n.linear(x))
    module.network.linear.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="its part `linear` has forward hooks, which a replay would not call"):
        assert graphed(module).captures == 0
    assert len(seen) == 2 * 12


def test_signed_zeros_and_nan_are_constants_like_others() -> None:
    def step(network: Network, x: Tensor, i: int) -> Any:
        return network(x, 0.0), network(x, -0.0), network(x, float("nan"))

    stats = graphed(Module(lambda n, x, c: n.linear(x).abs() * 0 + torch.copysign(torch.ones_like(x), x * 0 + c), step))
    assert stats.captures == 3


VIEWS: list[Callable[[Network, Tensor, int], Any]] = [
    lambda n, x, i: n(x.view(2, 4)),
    lambda n, x, i: n(x[:, :4]),
    lambda n, x, i: n(x[i % 2 :][:1]),
    lambda n, x, i: n(x.unsqueeze(0)),
]


@pytest.mark.parametrize("step", VIEWS)
def test_rule_7_views_given_to_a_network_do_not_let_it_overwrite_batches(step: Callable[..., Any]) -> None:
    kept: list[Tensor] = []

    def keeping(network: Network, x: Tensor, i: int) -> Any:
        kept.append(x)
        return step(network, x, i)

    module = Module(lambda n, x: n.linear(x), keeping)
    assert graphed(module).captures == 1
    batches = [batch.cpu() for batch in kept[12:]]
    assert_equal(batches, list(rows(24, 2)))


def test_rule_7_without_the_bridges_word_every_tensor_counts_as_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    from habana_frameworks.torch import _hpu_C

    from lightning_hpu_infer import _habana

    x = torch.ones(2).to("hpu")
    assert not _habana.is_view(x)
    assert _habana.is_view(x[1:])
    monkeypatch.delattr(_hpu_C, "get_view_hash")
    assert _habana.is_view(x)


def test_rule_4_one_bridge_graph_per_key_whatever_the_views_offset() -> None:
    step = lambda n, x, i: n(x[:, i : i + 4])  # noqa: E731
    wide = torch.arange(24 * 30.0).reshape(24, 30) / 100
    assert graphed(Module(lambda n, x: n.linear(x), step), DataLoader(wide, 2), max_graphs=1).captures == 1  # type: ignore[arg-type]


def test_one_signature_that_cannot_be_captured_does_not_cost_the_others_their_graphs() -> None:
    emulator.uninstall()
    emulator.install(emulator.EmulatorConfig(cpu_fallback_ops=frozenset({"aten::cumsum"})))

    def odd(network: Network, x: Tensor) -> Tensor:
        out: Tensor = network.linear(x)
        return out.cumsum(0) if len(x) == 3 else out

    batches = [torch.randn(3 if i % 4 == 3 else 2, 4) for i in range(16)]
    with pytest.warns(UserWarning, match="capturing it failed .*cpu fallback"):
        stats = graphed(Module(odd), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert stats.replays == 12 - 2


def test_an_environment_that_would_let_graphs_overwrite_batches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_HPUGRAPH_DISABLE_TENSOR_CACHE", "0")
    with pytest.raises(RuntimeError, match="PT_HPUGRAPH_DISABLE_TENSOR_CACHE is set to '0'"):
        predict(HPUInferenceAccelerator(), Net(), rows(12, 2))


def test_a_network_that_is_called_with_gradients_keeps_them() -> None:
    def step(network: Network, x: Tensor, i: int) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return network(x.clone()).requires_grad

    module = Module(lambda n, x: n.linear(x), step)
    assert predict(HPUInferenceAccelerator(), module, rows(12, 2), inference_mode=False) == [True] * 6


def test_what_a_graph_is_given_may_be_changed_by_the_step_afterwards() -> None:
    def step(network: Network, x: Tensor, i: int) -> Any:
        first = network(x)
        x.add_(1)
        return first, network(x)

    assert_like_stock(HPUInferenceAccelerator(), Module(lambda n, x: n.linear(x), step), DataLoader(Rows(24), 2))


class Stateful(nn.Module):
    """Keeps a running sum of its outputs, in a buffer or in an attribute, written in place or replaced."""

    total: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(4))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        rows = self.linear(x)
        if self.how == "copy":
            self.total.copy_(self.total + rows.sum(0))
        elif self.how == "add":
            self.total += rows.sum(0)
        elif self.how == "view":
            self.total[:2].add_(1)
        elif self.how == "out":
            torch.add(self.total, rows.sum(0), out=self.total)
        else:
            self.total = self.total + rows.sum(0)
        return rows + self.total


@pytest.mark.parametrize("how", ["copy", "add", "view", "out", "replace"])
def test_a_network_that_changes_its_own_state_is_not_run_twice(how: str) -> None:
    module = Net()
    module.net = Stateful(how)  # type: ignore[assignment]
    reason = "it keeps replacing tensors that it holds" if how == "replace" else "it changes its own state in place"
    with pytest.warns(UserWarning, match=reason):
        assert graphed(module).captures == 0


@pytest.mark.parametrize("how", ["copy", "replace"])
def test_nor_is_it_in_eager_mode(how: str) -> None:
    emulator.uninstall()
    torch._dynamo.reset()
    emulator.install(emulator.EmulatorConfig(lazy=False))
    module = Net()
    module.net = Stateful(how)  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="runs without torch.compile: it (changes|keeps replacing)"):
        graphed(module)
    torch._dynamo.reset()


def test_an_input_that_is_changed_through_a_view_is_changed_once() -> None:
    def change(network: Network, x: Tensor) -> Tensor:
        x[:, 0] += 1
        return network.linear(x)

    def step(network: Network, x: Tensor, i: int) -> Any:
        x = x.clone()
        return network(x), x

    with pytest.warns(UserWarning, match="it changes its input in place"):
        assert graphed(Module(change, step)).captures == 0


def test_a_small_column_is_compared_by_its_own_size() -> None:
    """Boxes of a thousand pixels beside a score below one, which a graph gets wrong."""

    def boxes(network: Network, x: Tensor) -> Tensor:
        network.calls += 1
        score = network.linear(x)[:, :1].sigmoid() * 0.1 * network.calls
        return torch.cat([x * 1000, score], 1)

    module = Module(boxes)
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="a replay differs from the plain forward"):
        predict(HPUInferenceAccelerator(), module, DataLoader([x] * 8, batch_size=None))  # type: ignore[arg-type]


def test_complex_results_are_compared_in_both_parts() -> None:
    def phase(network: Network, x: Tensor) -> Tensor:
        network.calls += 1
        return torch.complex(x, x * network.calls)

    module = Module(phase)
    x = torch.randn(2, 4)
    with pytest.warns(UserWarning, match="a replay differs from the plain forward"):
        predict(HPUInferenceAccelerator(), module, DataLoader([x] * 8, batch_size=None))  # type: ignore[arg-type]


class Tagged(UserDict[str, Any]):
    """Has an attribute besides its items."""

    tag = 1.0


def test_attributes_of_a_container_are_not_lost() -> None:
    def tagged(network: Network, batch: Tagged) -> Tensor:
        return network.linear(batch["x"]) * batch.tag

    def step(network: Network, x: Tensor, i: int) -> Any:
        batch = Tagged(x=x)
        batch.tag = float(i)
        return network(batch)

    with pytest.warns(UserWarning, match="it is given a Tagged, which may change unseen"):
        assert graphed(Module(tagged, step)).captures == 0


@dataclass
class Named:
    x: Tensor
    weight: Any


def test_containers_that_torch_does_not_know_are_captured() -> None:
    def step(network: Network, x: Tensor, i: int) -> Any:
        result = network(Named(x, 0.5), UserDict(y=x + 1, label="a"))
        return result.x

    module = Module(lambda n, g, m: Named(n.linear(g.x) * g.weight + m["y"], n.linear(g.x)), step)
    assert graphed(module).captures == 1


def test_values_that_keep_changing_are_reported() -> None:
    def step(network: Network, x: Tensor, i: int) -> Any:
        return network(x, i)

    with pytest.warns(UserWarning, match=r"given Python values that keep changing \(1, 2, 3, ...\)"):
        assert graphed(Module(lambda n, x, i: n.linear(x) + i, step)).captures == 0
