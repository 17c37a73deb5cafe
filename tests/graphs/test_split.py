"""The two parts of a traced graph do together what the graph does, and share memory where it does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from lightning_hpu_infer import _torch
from lightning_hpu_infer.graphs.examine import Examination
from lightning_hpu_infer.graphs.split import Split, rewrite_masks, split
from tests.helpers import assert_equal

pytestmark = pytest.mark.usefixtures("emulated")


class Model(nn.Module):
    """Has a weight, and a buffer that some functions write to."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("total", torch.zeros(4))
        self.drop = nn.Dropout(0.5)


Function = Callable[[Model, Tensor], Any]


class Runs:
    """A backend for TorchDynamo that runs the parts of each graph one after the other, as a replay would."""

    def __init__(self, device_type: str) -> None:
        self.parts: list[Split] = []
        self.random = False
        """Whether any graph draws random numbers."""
        self._device_type = device_type

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """Called by Dynamo with each graph."""
        rewrite_masks(module)
        parts = split(module, self._device_type)
        self.random |= Examination(module, self._device_type).random
        self.parts.append(parts)
        captured, rest = parts.captured, parts.rest
        if captured is None:
            return module.forward

        def run(*args: Any) -> Any:
            # A replay never runs Python, and its results are copied.
            results = [result.clone() for result in captured(*args)]
            return tuple(results) if rest is None else rest(*args, *results)

        return run

    def compile(self, function: Function) -> Function:
        """Compile a copy of a function."""

        def failed(error: Exception) -> None:
            raise error

        self._failed, self._timed = self._Method(failed), self._Method(lambda trace: trace())
        copied = _torch.with_its_code(lambda model, x: function(model, x))
        return _torch.compile_function(copied, self.__call__, self._failed.call, self._timed.call)

    class _Method:
        def __init__(self, function: Callable[[Any], Any]) -> None:
            self._function = function

        def call(self, argument: Any) -> Any:
            return self._function(argument)


def inputs(device: str) -> tuple[Model, Tensor]:
    model = Model().to(device).eval()
    for module in model.modules():
        # Those of the bridge, which a run removes too.
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return model, (torch.arange(12.0).reshape(3, 4) / 10 + 0.1).to(device)


def parts_of(function: Function, *, vary: bool = False) -> Split:
    """The parts of the only graph of a function, after the law was found to hold."""
    (parts,) = runs_of(function, vary=vary).parts
    return parts


def runs_of(function: Function, *, vary: bool = False) -> Runs:
    """All graphs of a function; what it does equals plain Python, also to its inputs."""
    runs = Runs("hpu")
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        outcomes = []
        for call in (function, runs.compile(function)):
            model, x = inputs("hpu")
            torch.manual_seed(1)
            with _torch.dynamic_dims([(x, 0)] if vary else []):
                outcomes.append(_traces_of_changes(call(model, x), model, x))
        assert_equal(outcomes[1], outcomes[0])
    return runs


def _traces_of_changes(result: Any, model: Model, x: Tensor) -> list[Any]:
    """What the result and all inputs are, and what they are after each result was changed in place."""
    found = [_on_host((result, x, model.total, model.linear.weight.detach()))]
    for number, tensor in enumerate(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
        tensor.add_(torch.ones_like(tensor) if tensor.dtype != torch.bool else tensor)
        found.append((number, _on_host((result, x, model.total, model.linear.weight.detach()))))
    return found


def _on_host(values: Any) -> Any:
    return tree_map(lambda leaf: leaf.cpu().clone() if isinstance(leaf, Tensor) else leaf, values)


WHOLE: dict[str, Function] = {
    "one result": lambda m, x: m.linear(x).softmax(-1),
    "a list": lambda m, x: [m.linear(x), x.sum(1)],
    "a dict": lambda m, x: {"a": m.linear(x), "b": x.sum(1)},
    "a result beside a number": lambda m, x: (m.linear(x), 3, "text", None),
    "max over a dimension": lambda m, x: x.max(1),
    "topk": lambda m, x: tuple(x.topk(2)),
    "a copy of the input": lambda m, x: x.clone(),
    "a changed copy": lambda m, x: x.clone().add_(1).mul_(2),
    "in place on an intermediate": lambda m, x: m.linear(x).add_(1).relu_(),
    "a part of an intermediate in place": lambda m, x: _part_in_place(m.linear(x)) + 1,
    "views on the way": lambda m, x: (x.view(2, 6).t() @ m.linear(x).reshape(2, 6)).sum(0),
    "chunks on the way": lambda m, x: sum(m.linear(x).chunk(2, 1)),
    "unbind on the way": lambda m, x: torch.stack(m.linear(x).unbind(0)) * 2,
    "dropout that is off": lambda m, x: functional.dropout(m.linear(x), 0.5, training=False),
    "a dropout module that is off": lambda m, x: m.drop(m.linear(x)),
    "attention": lambda m, x: functional.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "a written buffer": lambda m, x: (m.total.add_(x.sum(0)), m.linear(x))[1],
    "arange on the device": lambda m, x: x + torch.arange(4, device=x.device),
    "full on the device": lambda m, x: x * torch.full((4,), 2.0, device=x.device),
    "autocast": lambda m, x: _autocast(m, x),
    "no gradients inside": lambda m, x: _without_gradients(m, x),
    "a host tensor made inside": lambda m, x: m.linear(x) + torch.ones(4).to(x.device),
    "a host constant": lambda m, x: m.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]).to(x.device),
    "a host scalar": lambda m, x: m.linear(x) * torch.tensor(3.0),
    "a constant made on the device": lambda m, x: m.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
    "where": lambda m, x: torch.where(x > 0.5, x, m.linear(x)),
    "masked fill": lambda m, x: m.linear(x).masked_fill_(x > 0.5, 0.0),
    "an index on the device": lambda m, x: m.linear(x)[torch.arange(2, device=x.device)],
}


def _part_in_place(x: Tensor) -> Tensor:
    x[:, 1] = 0
    return x


def _autocast(model: Model, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        y: Tensor = model.linear(x).float()
    return y.round(decimals=1) + x


def _without_gradients(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = model.linear(x)
    return y + 1


@pytest.mark.parametrize("name", WHOLE)
def test_device_ops_are_captured_as_a_whole(name: str) -> None:
    parts = parts_of(WHOLE[name])
    assert parts.captured is not None
    assert (parts.rest, parts.reason, parts.hosted) == (None, "", ())


ALIASES: dict[str, Function] = {
    "the input": lambda m, x: (m.linear(x), x),
    "a view of the input": lambda m, x: (m.linear(x), x.view(4, 3)),
    "several views of the input": lambda m, x: (m.linear(x), x[:, 1:], x.t(), x[0]),
    "a detached input": lambda m, x: (m.linear(x), x.detach()),
    "chunks of the input": lambda m, x: (m.linear(x), *x.chunk(2, 1)),
    "a result and its view": lambda m, x: (lambda y: (y, y[0]))(m.linear(x)),
    "a view and its result": lambda m, x: (lambda y: (y[0], y))(m.linear(x)),
    "two views of one result": lambda m, x: (lambda y: (y[:, :2], y[:, 1:]))(m.linear(x)),
    "chunks of a result": lambda m, x: m.linear(x).chunk(2, 1),
    "split of a result": lambda m, x: m.linear(x).split([1, 3], 1),
    "unbind of a result": lambda m, x: m.linear(x).unbind(0),
    "a view of a view": lambda m, x: (lambda y: (y.t()[1:], y.view(-1)))(m.linear(x)),
    "a result in place and before": lambda m, x: (lambda y: (y, y.add_(1)))(m.linear(x)),
    "a result and its detached self": lambda m, x: (lambda y: (y, y.detach()))(m.linear(x)),
    "a written buffer, returned": lambda m, x: (m.linear(x), m.total.add_(x.sum(0))),
    "a view of a written buffer": lambda m, x: (m.total.add_(x.sum(0)), m.linear(x), m.total[1:])[1:],
    "a weight": lambda m, x: (m.linear(x), m.linear.weight.detach()),
    "expanded": lambda m, x: (lambda y: (y, y.sum(0).reshape(4)))(m.linear(x)),
}


@pytest.mark.parametrize("name", ALIASES)
def test_rule_4_results_share_memory_as_in_plain_python(name: str) -> None:
    parts = parts_of(ALIASES[name])
    assert parts.captured is not None
    assert parts.reason == ""


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.linear(x)[:, ::2],
        lambda m, x: m.linear(x).t(),
        lambda m, x: m.linear(x).view(-1),
        lambda m, x: (m.linear(x)[0], x.sum(0).unsqueeze(1)),
    ],
)
def test_a_view_of_a_result_that_nobody_else_shows_is_right(function: Function) -> None:
    assert parts_of(function).captured is not None


# What runs behind the captured part, and the reason that is given.
BEHIND: dict[str, tuple[Function, str]] = {
    "to the host at the end": (lambda m, x: m.linear(x).cpu(), "it works on cpu"),
    "host ops at the end": (lambda m, x: (m.linear(x).softmax(-1) + 1).exp().cpu() * 2 + 1, "it works on cpu"),
    "to the host, and a device result": (lambda m, x: (lambda y: (y.cpu(), y * 2))(m.linear(x)), "it works on cpu"),
    "random at the end": (lambda m, x: functional.dropout(m.linear(x).relu() + 1), "it draws random numbers"),
    "set by a mask at the end": (lambda m, x: _masked(m.linear(x).relu() + x.sin(), x > 0.5), "it indexes with a mask"),
}  # fmt: skip


def _masked(y: Tensor, mask: Tensor) -> Tensor:
    y[mask] = torch.zeros(1, device=y.device)[0]
    return y


@pytest.mark.parametrize("name", BEHIND)
def test_what_may_not_be_captured_runs_behind(name: str) -> None:
    function, reason = BEHIND[name]
    runs = runs_of(function)
    (parts,) = runs.parts
    assert parts.captured is not None
    assert parts.reason.startswith(reason)
    assert runs.random == (name == "random at the end")


# What is read again by captured ops, so that nothing or only what is before it may be captured.
MIDDLE: dict[str, tuple[Function, str]] = {
    "by the host and back": (lambda m, x: m.linear(m.linear(x).cpu().to(x.device)) + 1, "it works on cpu"),
    "random": (lambda m, x: m.linear(x) + torch.rand_like(x) * 0, "it draws random numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIDDLE)
def test_ops_after_what_may_not_be_captured_run_plainly_too(name: str) -> None:
    function, reason = MIDDLE[name]
    runs = runs_of(function)
    assert runs.random == (name == "random")
    for parts in runs.parts:
        assert parts.reason.startswith(reason)


@pytest.mark.parametrize("size", [1, 3 * 10**6])
def test_inputs_on_the_host_are_told(size: int) -> None:
    """Small ones may be captured by value; a large one keeps ops out of a graph."""
    runs, host = Runs("hpu"), torch.full((size, 1), 3.0)
    compiled = runs.compile(lambda m, x: m.linear(x) + host[0].to(x.device))
    with torch.inference_mode():
        model, x = inputs("hpu")
        assert_equal(compiled(model, x).cpu(), (model.linear(x) + 3).cpu())
    (parts,) = runs.parts
    assert len(parts.hosted) == (size == 1)
    assert ("is on cpu, and a graph would repeat the first value" in parts.reason) == (size > 1)


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (lambda m, x: m.linear(x).add_(1), []),
        (lambda m, x: (m.total.add_(1), m.linear(x))[1], ["total"]),
        (lambda m, x: (m.total[:2].add_(1), m.linear(x))[1], ["total"]),
        (lambda m, x: (m.total.copy_(x.sum(0)), m.linear(x))[1], ["total"]),
        (lambda m, x: (torch.add(m.total, 1, out=m.total), m.linear(x))[1], ["total"]),
        (lambda m, x: m.linear(x.add_(1)), ["x"]),
        (lambda m, x: (x[:, 0].add_(1), m.total.zero_(), m.linear(x))[2], ["x", "total"]),
        (lambda m, x: functional.relu(x, inplace=True) + m.linear(x), ["x"]),
        pytest.param(
            lambda m, x: functional.batch_norm(x, m.total, m.linear.bias.detach() ** 2, training=True),
            ["total"],
        ),
    ],
)
def test_rule_5_inputs_that_are_written_to_are_known(function: Function, writes: list[str]) -> None:
    parts = parts_of(function)
    assert parts.captured is not None
    names = [node.name for node in parts.captured.graph.nodes if node.op == "placeholder"]
    assert sorted("total" if "total" in names[i] else "x" for i in parts.written) == sorted(writes)


# In each a plain op and a captured one use memory that one of them writes to, so that their order matters.
ORDER: list[Function] = [
    lambda m, x: (m.linear(x), m.total.to("cpu", copy=True), m.total.add_(1))[:2],
    lambda m, x: (lambda y: (y.cpu(), y.add_(1), y * 2))(m.linear(x)),
    lambda m, x: (lambda y: (y.add_(1), y.cpu(), y * 2))(m.linear(x)),
    lambda m, x: (x.copy_(torch.ones(3, 4)), m.linear(x) + 1)[1],
    lambda m, x: (m.total.add_(1), m.total.to("cpu", copy=True), m.linear(x))[1:],
    lambda m, x: (lambda y: (y.add_(torch.ones(3, 4).to(y.device)), y.mul_(2), y + 1))(m.linear(x)),
    lambda m, x: (m.total.copy_(torch.ones(4)), m.total.add_(1), m.linear(x) + m.total)[2],
]


@pytest.mark.parametrize("function", ORDER)
def test_rule_5_the_order_of_writes_and_reads_is_kept(function: Function) -> None:
    runs_of(function)


def test_symbolic_sizes_may_be_results() -> None:
    def function(model: Model, x: Tensor) -> Any:
        size, y = x.shape[0] * 2, model.linear(x)
        torch._dynamo.graph_break()
        return y * size, size, x.shape[0]

    first = runs_of(function, vary=True).parts[0]
    assert first.captured is not None


@pytest.mark.parametrize(
    "function", [lambda m, x: x[:2], lambda m, x: (x.t(), x.view(-1)), lambda m, x: (x.shape[0], x.detach())]
)
def test_a_graph_of_views_alone_has_nothing_to_capture(function: Function) -> None:
    parts = parts_of(function)
    assert (parts.captured, parts.reason) == (None, "")


def test_a_function_without_ops_has_no_graph() -> None:
    assert runs_of(lambda m, x: (x, 3)).parts == []


def test_gradients_are_left_to_plain_ops() -> None:
    runs = Runs("hpu")
    compiled = runs.compile(lambda m, x: m.linear(x).relu() + 1)
    model, x = inputs("hpu")
    assert compiled(model, x).requires_grad
    (parts,) = runs.parts
    assert parts.captured is None
    assert parts.reason.startswith(f"it records gradients, at {__file__}:")


def test_it_works_for_other_devices() -> None:
    runs = Runs("cpu")
    model, x = inputs("cpu")
    with torch.inference_mode():
        assert_equal(runs.compile(lambda m, x: m.linear(x)[:, :2])(model, x), model.linear(x)[:, :2])
    assert [parts.reason for parts in runs.parts] == [""]
