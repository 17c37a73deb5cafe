"""When a step is traced, when it is not, and what tracing must not change."""

import copy
import pickle
import re
from collections import UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, _torch
from tests.graphs.models import BATCHES, HPU, Model, graphs_of, one_warning, run, sizes
from tests.helpers import Broken, Net, assert_equal, predict, rows

pytestmark = pytest.mark.usefixtures("emulated")


# Which calls are traced


@pytest.mark.parametrize(
    ("numbers", "traces", "captures", "plain"),
    [
        ([2] * 6, 1, 1, 1),
        ([2] * 6 + [1], 1, 1, 2),  # a short last batch
        ([2, 2, 2, 3, 3, 4, 4, 5, 5], 2, 4, 4),  # the sizes were not known to vary
        ([2, 3, 4, 5] * 3, 1, 4, 4),
        ([2, 3, 4, 4, 5, 5, 6, 6], 1, 3, 5),
        (list(range(2, 12)), 0, 0, 10),
    ],
    ids=["one", "a short last one", "one by one", "in turn", "known to vary", "never again"],
)
def test_new_shapes_run_plainly_and_are_traced_when_they_come_again(
    numbers: list[int], traces: int, captures: int, plain: int
) -> None:
    counts = run(Model(), sizes(*numbers))
    assert (counts.traces, counts.captures, counts.plain_calls) == (traces, captures, plain)


def test_new_dtypes_are_new_shapes() -> None:
    model, batches = Model(step=lambda n, x, i: n(x.float())), sizes(*[2] * 8)
    counts = run(model, [*batches[:4], *(batch.bfloat16() for batch in batches[4:])])
    assert (counts.traces, counts.plain_calls) == (2, 2)


def test_containers_that_torch_does_not_know_are_walked() -> None:
    @dataclass
    class Named:
        x: Tensor
        weight: float

    step = lambda n, x, i: n(Named(x, 0.5), UserDict(y=x + 1, label="a"))["y"]  # noqa: E731
    model = Model(lambda n, named, more: UserDict(y=n.linear(named.x) * named.weight + more["y"]), step)
    for names in (None, ["network"]):
        assert run(model, graph_modules=names).replays == BATCHES - 2


# Numbers


def test_a_batch_number_that_is_not_used_costs_nothing() -> None:
    counts = run(Model())
    assert (counts.traces, counts.captures, counts.replays) == (1, 1, BATCHES - 2)


NUMBERED: dict[str, Callable[..., Any]] = {
    "added": lambda n, x, i: n(x) + i,
    "multiplied": lambda n, x, i: n(x) * (i * 0.5),
    "in a list": lambda n, x, i: [n(x)] * (i + 1),
    "in a key": lambda n, x, i: {f"batch {i}": n(x)},
}


@pytest.mark.parametrize("name", NUMBERED)
def test_a_batch_number_that_is_used_leaves_graphs_to_the_networks(name: str) -> None:
    with one_warning("`predict_step` as a whole runs without a graph from now on: .*of the networks .*`network`"):
        counts = run(Model(step=NUMBERED[name]), sizes(*[2] * 30))
    assert counts.replays >= 15  # on every later batch
    assert counts.traces < 10


def test_a_batch_number_in_a_text_is_right() -> None:
    assert run(Model(step=lambda n, x, i: {"name": f"batch {i}", "y": n(x)}), sizes(*[2] * 30)).replays >= 15


def test_two_values_of_a_batch_number_are_two_traces() -> None:
    counts = run(Model(step=lambda n, x, i: n(x) if i % 2 else -n(x)), sizes(*[2] * 16))
    assert counts.traces == counts.captures <= 3
    assert counts.replays >= 10


def test_a_list_that_grows_leaves_graphs_to_the_networks() -> None:
    def step(network: Any, x: Tensor, i: int) -> Tensor:
        network.listed.append(x.sum())
        return network(x) + len(network.listed)

    with one_warning("`predict_step` as a whole runs without a graph from now on"):
        assert run(Model(step=step), sizes(*[2] * 20)).replays >= 8


def test_a_network_that_is_given_a_number_in_every_batch_ends_plain() -> None:
    model = Model(lambda n, x, i: n.linear(x) + i, lambda n, x, i: n(x, i))
    with one_warning("The network `network` runs without graphs from now on: .*Pass what changes as a tensor"):
        run(model, sizes(*[2] * 20), graph_modules=["network"])


def test_constants_of_calls_are_told_apart() -> None:
    def scaled(network: Any, x: Tensor, scale: float, flip: bool = False) -> Tensor:
        out: Tensor = network.linear(x).abs() * 0 + torch.copysign(torch.ones_like(x), x * 0 + scale)
        return -out if flip else out

    step = lambda n, x, i: (n(x, 1), n(x, 1, True), n(x, -2.5))  # noqa: E731
    assert run(Model(scaled, step)).replays > 0
    assert run(Model(scaled, step), graph_modules=["network"]).replays > 0


# What is around a call


class Functions(TorchFunctionMode):
    """Doubles what linear layers return."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.linear else result


class Ops(TorchDispatchMode):
    """Counts ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def doubling() -> Iterator[None]:
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 2 if isinstance(module, nn.Linear) else None
    )
    yield
    hook.remove()


@pytest.mark.parametrize(("around", "reason"), [(Functions, "TorchFunctionMode"), (Ops, "Mode"), (doubling, "hook")])
def test_rule_5_under_modes_and_global_hooks_a_call_runs_plainly(around: Any, reason: str) -> None:
    model = Model()
    graphs = graphs_of(model)
    with torch.inference_mode(), graphs.attached(model.forward) as step:
        for i, x in enumerate(sizes(*[2] * 8)):
            if i not in (3, 6):
                assert_equal(step(x.to(HPU), i).cpu(), model.network(x.to(HPU)).cpu())
                continue
            with around() as mode:
                found = step(x.to(HPU), i).cpu()
                assert_equal(found, model.network(x.to(HPU)).cpu())
            assert mode is None or not isinstance(mode, Ops) or mode.seen > 2
    assert (graphs.counts.traces, graphs.counts.replays) == (1, 4)
    assert sum(times for text, times in graphs.counts.reasons.items() if reason in text) == 2


@contextmanager
def high_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@contextmanager
def another_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize("around", [high_precision, another_attention])
def test_rule_5_switches_of_ops_are_traced_apart(around: Any) -> None:
    model = Model(lambda n, x: nn.functional.scaled_dot_product_attention(x[None], n.linear(x)[None], x[None]))
    graphs = graphs_of(model)
    x = sizes(2)[0].to(HPU)
    with torch.inference_mode(), graphs.attached(model.forward) as step:
        expected = model(x, 0).cpu()
        for _ in range(4):
            assert_equal(step(x, 0).cpu(), expected)
        assert graphs.counts.traces == 1
        with around():
            assert_equal([step(x, 0).cpu() for _ in range(3)], [expected] * 3)
        assert graphs.counts.traces == 2
        assert_equal(step(x, 0).cpu(), expected)
        assert graphs.counts.traces == 2


# Errors


@pytest.mark.parametrize("at", [0, 1, 2, 5])
@pytest.mark.parametrize("where", ["step", "network", "op"])
def test_rule_10_the_users_errors_come_out_as_they_are(at: int, where: str) -> None:
    def network(n: Any, x: Tensor, fails: bool) -> Tensor:
        if fails and where == "network":
            raise Broken("in the network")
        return n.linear(x[:, :3] if fails and where == "op" else x)

    class Fails(Net):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(network)
            self.done: list[int] = []

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            fails = batch_idx == at
            if fails and where == "step":
                raise Broken("in the step")
            result = self.model.network(batch, fails)
            self.done.append(batch_idx)
            return result

    outcomes = []
    for accelerator in ("cpu", HPUInferenceAccelerator()):
        module = Fails()
        with pytest.raises(RuntimeError if where == "op" else Broken) as error:
            predict(accelerator, module, rows(16, 2))
        outcomes.append((module.done, error.type, None if where == "op" else str(error.value)))
    assert outcomes[0] == outcomes[1]


def test_rule_10_a_step_that_cannot_be_traced_gives_right_results(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_to_trace(monkeypatch, 1)
    with one_warning("without an HPU graph: tracing failed .InternalTorchDynamoError: an internal fault"):
        counts = run(Model(), sizes(*[2] * 20))
    assert counts.replays >= 10  # of the network


def test_rule_10_a_real_fault_of_dynamo_gives_right_results() -> None:
    def step(network: Any, x: Tensor, i: int) -> Tensor:
        with torch.autocast("hpu", torch.bfloat16, enabled=bool(i)):
            y = network(x)
        return y.float() * 0 + 1

    with one_warning("without an HPU graph: tracing failed, at .*test_traced.py:.* .InternalTorchDynamoError"):
        assert run(Model(step=step), sizes(*[2] * 20)).replays >= 10


def test_rule_10_a_network_that_cannot_be_traced_gives_right_results(monkeypatch: pytest.MonkeyPatch) -> None:
    fails_to_trace(monkeypatch, 99)
    with one_warning("The network `network` runs without graphs from now on: tracing failed"):
        assert run(Model(), sizes(*[2] * 20), graph_modules=["network"]).replays == 0


def fails_to_trace(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let Dynamo raise an internal error, so many times."""
    original, left = _torch._Callback.__init__, [times]

    def initialise(self: Any, inner: Any, *args: Any) -> None:
        def broken(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                raise torch._dynamo.exc.InternalTorchDynamoError("an internal fault")
            return inner(*given, **named)

        original(self, broken, *args)

    monkeypatch.setattr(_torch._Callback, "__init__", initialise)


def test_a_line_that_cannot_be_in_a_graph_is_named() -> None:
    def step(network: Any, x: Tensor, i: int) -> Any:
        return network(x + torch.rand_like(x))

    with one_warning(r"it draws random numbers .*test_traced\.py:\d+"):
        model = Model(step=step)
        graphs = graphs_of(model)
        with torch.inference_mode(), graphs.attached(model.forward) as graphed:
            for x in sizes(*[2] * 6):
                graphed(x.to(HPU), 0)


def branch(network: Any, x: Tensor) -> Tensor:
    out: Tensor = network.linear(x)
    return out.exp() if x.sum().item() > 0 else -out


def mask(network: Any, x: Tensor) -> Tensor:
    out: Tensor = network.linear(x)
    out[x > 0.5] = 0
    return out


READS: dict[str, Callable[..., Any]] = {
    "a value": branch,
    "a condition": lambda n, x: n.linear(x) if (x > 1).any() else n.linear(x) + 1,
    "a mask": mask,
    "a selection": lambda n, x: n.linear(x)[x > 0.5],
    "positions": lambda n, x: (n.linear(x), x.nonzero()),
    "to the host": lambda n, x: n.linear(x) + x.cpu().mean(),
    "from the host": lambda n, x: n.linear(x) + torch.ones(4).to(x.device),
    "a constant": lambda n, x: n.linear(x) + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
    "a list": lambda n, x: (n.linear(x), x.tolist()),
    "NumPy": lambda n, x: n.linear(x) + torch.from_numpy(x.cpu().numpy() * 2).to(x.device),
}


@pytest.mark.filterwarnings("ignore:.*runs without")
@pytest.mark.parametrize("name", READS)
def test_networks_that_read_the_device_are_right(name: str) -> None:
    run(Model(READS[name]))


@pytest.mark.parametrize(
    ("name", "words"), [("a value", "item"), ("a condition", "branch on a tensor's value"), ("from the host", None)]
)
def test_where_a_step_is_cut_into_graphs_is_told_with_the_line(name: str, words: str | None) -> None:
    counts = run(Model(READS[name]))
    if words is None:
        assert (counts.breaks, "cut" in str(counts)) == ({}, False)
        return
    (reason,) = counts.breaks
    assert words in reason
    assert re.search(r", at .*test_traced\.py:\d+$", reason)
    assert f"The step is cut into graphs there: {reason}." in str(counts)
    assert counts.totals()["breaks"] == {reason: 1}


# What remains after a run


@pytest.mark.parametrize("how", ["function", "module in place", "module", "step"])
def test_what_the_user_has_compiled_goes_on_working(how: str) -> None:
    module: Any = Net()
    expected = predict("cpu", Net(), rows(16, 2))
    if how == "function":
        function = torch.compile(lambda net, x: net(x), backend="eager")
        module.predict_step = lambda batch, batch_idx: function(module.net, batch)
    elif how == "module in place":
        module.net.compile(backend="eager")
    elif how == "module":
        module.net = torch.compile(module.net, backend="eager")
    else:
        module = torch.compile(module, backend="eager")
    found = predict(HPUInferenceAccelerator(), module, rows(16, 2))
    assert_equal(found, expected)
    if how == "module in place":
        assert module.net._compiled_call_impl is not None


def test_rule_11_a_run_leaves_dynamo_and_tensors_as_they_were() -> None:
    config = torch._dynamo.config.save_config()
    tensors = [torch.ones(number, 4) for number in (2, 3, 2, 3, 4)]

    class Marked(Net):
        left: list[list[str]]

        def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.left.append([name for name in vars(batch) if "dynamo" in name])

    module = Marked()
    module.left = []
    predict(HPUInferenceAccelerator(defer_hooks=False), module, DataLoader(tensors, batch_size=None))  # type: ignore[arg-type]
    assert module.left == [[]] * 5
    assert [vars(tensor) for tensor in tensors] == [{}] * 5
    assert torch._dynamo.config.save_config() == config


@pytest.mark.parametrize("flags", [{}, {"graph_modules": ["net"]}], ids=["step", "network"])
def test_rule_11_copies_made_in_a_run_carry_nothing_of_ours(flags: dict[str, Any]) -> None:
    class Copies(Net):
        def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if batch_idx == 4:
                vars(self)["copies"] = [copy.deepcopy(self.net), pickle.loads(pickle.dumps(self.net))]

    module = Copies()
    expected = predict("cpu", Net(), rows(16, 2))
    assert_equal(predict(HPUInferenceAccelerator(**flags), module, rows(16, 2)), expected)
    for each in (module.net, *vars(module)["copies"]):
        for part in each.modules():
            assert {"forward", "_call_impl", "__call__"}.isdisjoint(vars(part))
            assert part._compiled_call_impl is None
        assert b"lightning_hpu_infer" not in pickle.dumps(each)
    x = torch.ones(2, 4)
    copied = vars(module)["copies"][0].cpu()
    assert_equal(copied(x), module.net(x))


def test_where_torch_compile_is_disabled_everything_runs_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.warns(UserWarning, match="tracing failed .RuntimeError: torch.compile is disabled"):
        assert run(Model(), sizes(*[2] * 6)).traces == 0
