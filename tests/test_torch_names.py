"""The private names of torch that this package uses are there, and do what it takes them to do."""

import gc
import traceback
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_hpu_infer import _dynamo, _torch
from lightning_hpu_infer.graphs.replacements import DataReplacements
from lightning_hpu_infer.graphs.store import tensor_description


class Compiles:
    """Collects what Dynamo hands to a backend and tells of failures; it may be faulty."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.modules: list[GraphModule] = []
        self.errors: list[Exception] = []
        self.traces = 0
        self._fault = fault

    def backend(self, module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.modules.append(module)
        if self._fault is not None:
            raise self._fault
        return module.forward

    def failed(self, error: Exception) -> None:
        self.errors.append(error)

    def timed(self, trace: Callable[[], Any]) -> Any:
        self.traces += 1
        return trace()

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a copy of a function with this backend."""
        self.own = _torch.with_its_code(function)
        return _torch.compile_function(self.own, self.backend, self.failed, self.timed)


def shifted(x: Tensor) -> Tensor:
    return (x + 1).relu() + 1


def test_every_name_exists() -> None:
    assert all(hasattr(_torch, name) for name in _torch.__all__)
    assert sorted(_torch.__all__) == _torch.__all__
    config = torch._dynamo.config
    assert all(hasattr(config, name) for name in _dynamo.settings())


@pytest.mark.parametrize("path", _dynamo.REPAIRS)
def test_what_is_repaired_exists_and_is_as_before_afterwards(path: str) -> None:
    _, _, before = _dynamo.found(path)
    assert before is not None
    with _dynamo.repaired():
        assert _dynamo.found(path)[2] is not before
        with _dynamo.repaired():
            assert _dynamo.found(path)[2] is not before
    assert _dynamo.found(path)[2] is before


def test_a_name_that_torch_lacks_needs_no_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("gone.Class.method", "side_effects.Gone.method", "side_effects.SideEffects.gone"):
        monkeypatch.setitem(_dynamo.REPAIRS, path, _dynamo.REPAIRS["variables.ConstDictVariable.as_python_constant"])
        assert _dynamo.found(path)[2] is None
    with _dynamo.repaired():
        pass


def test_a_function_is_compiled_with_time_taken_and_settings_as_before() -> None:
    first = Compiles()
    first.compile(shifted)(torch.ones(2))  # in a process the first one has Dynamo trace functions of its own too
    config, compiles = torch._dynamo.config.save_config(), Compiles()
    compiled = compiles.compile(shifted)
    assert [compiled(torch.ones(2)).tolist() for _ in range(3)] == [[3.0, 3.0]] * 3
    assert (len(compiles.modules), compiles.errors) == (1, [])
    assert compiles.traces == 1
    assert torch._dynamo.config.save_config() == config


def test_a_faulty_backend_is_told_and_the_function_runs() -> None:
    compiles = Compiles(ValueError("a faulty backend"))
    compiled = compiles.compile(shifted)
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
    (error,) = compiles.errors
    assert "a faulty backend" in str(error)
    # Nor is it asked again for the same frame.
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
    assert len(compiles.modules) == 1


def test_the_line_of_an_error_is_the_users() -> None:
    error = torch._dynamo.exc.Unsupported("not traced")
    assert _torch.line_of(error) == ""
    error.real_stack = traceback.extract_stack()
    assert _torch.line_of(error).startswith(f", at {__file__}:")


def test_the_users_own_compiled_functions_are_left_alone() -> None:
    theirs, ours = torch.compile(shifted, backend="eager"), Compiles()
    assert theirs(torch.ones(2)).tolist() == [3.0, 3.0]
    compiled = ours.compile(shifted)
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]
    _torch.forget_compiled(ours.own)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert theirs(torch.ones(2)).tolist() == [3.0, 3.0]
    assert shifted(torch.ones(2)).tolist() == [3.0, 3.0]


def test_each_copy_of_a_function_has_a_cache_of_its_own() -> None:
    first, second = Compiles(), Compiles()
    for compiles in (first, second, first):
        compiles.compile(shifted)(torch.ones(2))
    assert (len(first.modules), len(second.modules)) == (2, 1)
    assert first.own.__code__ is not second.own.__code__ is not shifted.__code__


def test_what_was_compiled_can_be_freed() -> None:
    compiles = Compiles()
    compiled = compiles.compile(shifted)
    compiled(torch.ones(2))
    own, module = compiles.own, weakref.ref(compiles.modules.pop())
    backend = weakref.ref(compiles)
    del compiled, compiles
    _torch.forget_compiled(own)
    gc.collect()
    assert module() is None
    assert backend() is None


def called(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Dynamo cannot trace into what reads the device, and compiles that by itself then."""
    return function(x)


def reads(x: Tensor) -> Tensor:
    y = shifted(x)
    return y + 1 if y.sum().item() > 0 else y


def test_code_that_many_models_share_is_compiled_for_every_one_of_them() -> None:
    kept = [Compiles() for _ in range(80)]
    for compiles in kept:
        assert compiles.compile(called)(reads, torch.ones(2)).tolist() == [4.0, 4.0]
    assert [len(compiles.modules) > 0 for compiles in kept] == [True] * 80


def reads_or_none(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    y = (x + 1) * 2
    return y + 1 if y.sum().item() > 0 else y


def test_code_in_which_one_model_has_nothing_to_trace_is_traced_for_another() -> None:
    first, second = Compiles(), Compiles()
    assert first.compile(called)(reads_or_none, None) is None
    assert second.compile(called)(reads_or_none, torch.ones(2)).tolist() == [5.0, 5.0]
    assert (len(first.modules), len(second.modules) > 0) == (0, True)


def test_dimensions_are_marked_for_one_call_only() -> None:
    compiles, tensors = Compiles(), [torch.ones(2, 3), torch.ones(4, 3), torch.ones(5, 3)]
    compiled = compiles.compile(shifted)
    with _torch.dynamic_dims([(tensors[0], 0)]):
        assert vars(tensors[0])
        compiled(tensors[0])
    assert [vars(tensor) for tensor in tensors] == [{}, {}, {}]
    for tensor in tensors:
        compiled(tensor)
    assert len(compiles.modules) == 1
    values = [_torch.fake_value(node) for node in compiles.modules[0].graph.nodes if node.op == "placeholder"]
    sizes = [_torch.sizes_of(value) for value in values if isinstance(value, Tensor)]
    assert [(type(rows), columns) for rows, columns in sizes] == [(str, 3)]


def test_the_users_marks_of_dimensions_stay() -> None:
    x = torch.ones(2, 3)
    torch._dynamo.maybe_mark_dynamic(x, 1)
    before = {name: set(value) if isinstance(value, set) else value for name, value in vars(x).items()}
    with _torch.dynamic_dims([(x, 0)]):
        pass
    assert {name: vars(x)[name] for name in before} == before


def test_placeholders_tell_what_they_stand_for() -> None:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("shift", torch.ones(2))

        def forward(self, x: Tensor) -> Any:
            return self.linear(x) + self.shift

    model, compiles = Linear(), Compiles()
    with torch.no_grad():
        compiles.compile(lambda x: model(x))(torch.ones(1, 2))
    nodes = [node for node in compiles.modules[0].graph.nodes if node.op == "placeholder"]
    assert [_torch.is_static(node) for node in nodes].count(True) == 3
    assert all(isinstance(_torch.fake_value(node), _torch.FakeTensor) for node in nodes)
    assert __file__ in _torch.users_line(compiles.modules[0].graph.nodes)


def test_memory_and_layout_of_tensors_are_known() -> None:
    x = torch.zeros(2, 3)
    assert _torch.storage_of(x) == _torch.storage_of(x[0]) != _torch.storage_of(x.clone())
    assert tensor_description(x) != tensor_description(x.t())
    assert tensor_description(x) == tensor_description(x + 1)


SWITCHES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "cudnn": lambda: torch.backends.cudnn.flags(enabled=False),
    "deterministic": lambda: torch.backends.cudnn.flags(deterministic=True),
    "mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:TF32 acceleration")
@pytest.mark.parametrize("name", SWITCHES)
def test_switches_that_dynamo_does_not_guard_are_seen(name: str) -> None:
    before = _torch.guard_gaps("cpu")
    with SWITCHES[name]():
        assert _torch.guard_gaps("cpu") != before
    assert _torch.guard_gaps("cpu") == before


def test_the_precision_of_products_is_seen() -> None:
    before, known = torch.get_float32_matmul_precision(), _torch.guard_gaps("cpu")
    try:
        torch.set_float32_matmul_precision("medium")
        assert _torch.guard_gaps("cpu") != known
    finally:
        torch.set_float32_matmul_precision(before)


def test_global_hooks_and_modes_ask_for_plain_calls() -> None:
    assert _torch.must_run_plainly() == ""
    registers = nn.modules.module
    for register in (registers.register_module_forward_hook, registers.register_module_forward_pre_hook):
        handle = register(lambda *_: None)
        assert "global module hook" in _torch.must_run_plainly()
        handle.remove()
    for mode in (TorchFunctionMode(), _torch.Dispatch()):
        with mode:
            assert "Mode is active" in _torch.must_run_plainly()
    assert _torch.must_run_plainly() == ""


# Memory given to tensors


def replacements() -> list[Callable[[Tensor], object]]:
    return [
        lambda tensor: setattr(tensor, "data", torch.ones(2)),
        lambda tensor: tensor.set_(torch.ones(2)),
        lambda tensor: torch.utils.swap_tensors(tensor, torch.ones(2)),
    ]


@pytest.mark.parametrize("replace", replacements())
def test_rule_5_memory_given_to_a_tensor_is_noticed(replace: Callable[[Tensor], object]) -> None:
    watcher, mine, other = DataReplacements(), torch.zeros(2), torch.zeros(2)
    with watcher.watched():
        assert not watcher.any_since(0, (mine, other))
        replace(mine)
        assert watcher.any_since(0, (mine,))
        assert not watcher.any_since(0, (other,))
        assert not watcher.any_since(watcher.count, (mine, other))
    assert mine.tolist() == [1.0, 1.0]


def test_rule_5_what_leaves_memory_alone_is_not_noticed() -> None:
    watcher, x = DataReplacements(), torch.zeros(2)
    with watcher.watched():
        x.data.add_(1)
        x.copy_(torch.ones(2))
        x.resize_(2)
        assert x.data.tolist() == [1.0, 1.0]
    assert watcher.count == 0


@pytest.mark.parametrize("first", [0, 1])
def test_rule_11_watchers_that_end_in_any_order_leave_torch_as_it_was(first: int) -> None:
    before = torch.Tensor.data, torch.Tensor.set_, torch.utils.swap_tensors, set(vars(torch.Tensor))
    stacks, watchers = [ExitStack(), ExitStack()], [DataReplacements(), DataReplacements()]
    for stack, watcher in zip(stacks, watchers, strict=True):
        stack.enter_context(watcher.watched())
    for replace in replacements():
        replace(torch.zeros(2))
    counts = [watcher.count for watcher in watchers]
    assert counts[0] == counts[1] >= 3
    stacks[first].close()
    torch.zeros(2).data = torch.ones(2)
    assert watchers[first].count == counts[0]
    assert watchers[1 - first].count == counts[0] + 1
    stacks[1 - first].close()
    assert (torch.Tensor.data, torch.Tensor.set_, torch.utils.swap_tensors, set(vars(torch.Tensor))) == before


# Classes


class Patched(nn.Linear):
    def helper(self) -> int:
        return 1

    @property
    def shown(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Patched, "forward", lambda self, x: x),
        (Patched, "helper", lambda self: 2),
        (Patched, "shown", property(lambda self: 2)),
        (Patched, "added", 1),
        (nn.Linear, "forward", lambda self, x: x),
        (nn.Module, "__call__", lambda self, x: x),
    ],
)
def test_rule_5_patched_classes_are_noticed(kind: type, name: str, value: object) -> None:
    functions = _torch.ClassFunctions([Patched])
    before = functions.now()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kind, name, value, raising=False)
        assert functions.now() != before
    assert functions.now() == before


def test_names_that_torch_adds_to_its_own_classes_do_not_look_like_a_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo leaves `___needs_generation_tag_patch` on `nn.Module` when it first traces a module."""
    functions = _torch.ClassFunctions([Patched])
    before = functions.now()
    monkeypatch.setattr(nn.Module, "___added_by_torch", False, raising=False)
    assert functions.now() == before


# What Dynamo logs


def test_a_break_of_the_graph_writes_nothing_about_dynamo(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert Compiles().compile(reads)(torch.ones(3)).tolist() == [4.0] * 3
    assert [record for record in caplog.records if record.name.startswith("torch._dynamo")] == []
