"""Every private name of torch that this package uses, with the reason.

`tests/test_torch_names.py` fails if one of them moves. Everything here is for the main thread.
"""

import re
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor, _prims_common, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import device_interface, eval_frame
from torch._dynamo import types as dynamo_types
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lightning_hpu_infer import _dynamo
from lightning_hpu_infer.randomness import tracing

__all__ = [
    "ClassFunctions",
    "Dispatch",
    "FakeTensor",
    "OpOverload",
    "break_of",
    "call_module",
    "compile_function",
    "compile_with",
    "dynamic_dims",
    "ensure_device_interface",
    "fake_value",
    "forget_compiled",
    "guard_gaps",
    "is_dense",
    "is_static",
    "line_of",
    "mentions",
    "must_run_plainly",
    "number_as_text",
    "sizes_of",
    "storage_of",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "users_line",
    "with_its_code",
]

# Frames of these are not the user's.
_LIBRARIES = tuple(str(Path(file).parent) for file in (__file__, torch.__file__, lightning.__file__))
# A base class for modes that look at ops.
Dispatch = TorchDispatchMode


class _Callback:
    """Dynamo's callback for a frame, under `settings` of `_dynamo.py`. It never raises.

    Dynamo reads settings only while it compiles, so patching them here costs a compiled call nothing.
    """

    def __init__(
        self, inner: Any, failed: Callable[[Exception], None], timed: Callable[[Callable[[], Any]], Any]
    ) -> None:
        self._inner = inner
        self._failed, self._timed = failed, timed
        self._settings = _dynamo.settings()
        self._skipped: weakref.WeakSet[types.CodeType] = weakref.WeakSet()
        """Code of frames that could not be traced."""
        # By this chain Dynamo finds the backend that a compiled frame belongs to (`convert_frame.py`).
        self._torchdynamo_orig_backend = inner  # torch >= 2.8
        self._torchdynamo_orig_callable = inner

    def __call__(self, frame: Any, *args: Any, **kwargs: Any) -> Any:
        if frame.f_code in self._skipped:
            return _skip()
        try:
            with tracing(), dynamo_config.patch(**self._settings), warnings.catch_warnings(), _dynamo.repaired():
                # Dynamo warns of code that it traces badly. Where warnings are errors, it would give up there.
                warnings.simplefilter("ignore")
                result = self._timed(partial(self._inner, frame, *args, **kwargs))
            # Otherwise Dynamo would never ask again for this code, whichever model calls it.
            if getattr(result, "guarded_code", None) is None and _may_suit_another_model(frame.f_code):
                self._skipped.add(frame.f_code)
                return _skip()
            return result
        except Exception as error:
            self._skipped.add(frame.f_code)
            self._failed(error)
            return _skip()


def _may_suit_another_model(code: types.CodeType) -> bool:
    """Whether code is the user's or a module's `forward`. Other frames of libraries are too many to ask each time."""
    return code.co_name == "forward" or not code.co_filename.startswith(_LIBRARIES)


def _skip() -> Any:
    """The answer that a frame runs as Python, and that Dynamo should ask again for its code, which may be the user's.

    Before torch 2.7 the only such answer is None, after which Dynamo never asks again.
    """
    if not hasattr(dynamo_types, "ConvertFrameReturn"):
        return None
    skipped = dynamo_types.ConvertFrameReturn()
    skipped.apply_to_code = False
    return skipped


def compile_function(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    failed: Callable[[Exception], None],
    timed: Callable[[Callable[[], Any]], Any],
) -> Callable[..., Any]:
    """`torch.compile` with Dynamo's settings patched while it compiles, and errors passed on instead of raised.

    Args:
        function: What to compile. Dynamo keeps compiled code with a function's code object: see `with_its_code`.
        backend: Called with each FX graph and its example inputs.
        failed: Called with an error of Dynamo's for a frame, which runs as plain Python then.
        timed: Called with the function by which Dynamo, including the backend, compiles a frame; returns its result.
            These three are methods of an object that outlives the result, which does not keep it alive.

    Returns:
        The compiled function; `function` itself where torch.compile is not possible, after `failed` was called.
    """
    backend = _weakly(backend)
    try:
        context: Any = torch._dynamo.optimize(backend=backend, dynamic=None)
    except Exception as error:  # A Python that this torch cannot trace.
        failed(error)
        return function
    if not hasattr(context, "callback"):
        failed(RuntimeError("torch.compile is disabled in this process, see TORCH_COMPILE_DISABLE"))
        return function
    # Dynamo keeps backends there for `torch._dynamo.reset()`, as long as the process lives.
    eval_frame.cached_backends.pop(id(backend), None)
    context.callback = _Callback(context.callback, _weakly(failed), _weakly(timed))
    return context(function)  # type: ignore[no-any-return]


def forget_compiled(function: Callable[..., Any]) -> None:
    """Free what Dynamo compiled for a function of `with_its_code`; it would keep that permanently (torch 2.13)."""
    torch._C._dynamo.eval_frame.reset_code(function.__code__)


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that does not keep its object alive.

    Dynamo refers to backends from C++, where the garbage collector finds no cycles.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> Any:
        found = reference()
        assert found is not None
        return found(*args)

    return call


def compile_with(backend: str, module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
    """What a registered backend of `torch.compile` makes of an FX graph."""
    lookup: Any = torch._dynamo.lookup_backend
    return lookup(backend)(module, example_inputs)  # type: ignore[no-any-return]


def with_its_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function with a separate code object, and so with a separate cache of compiled code."""
    assert isinstance(function, types.FunctionType)
    # By file, line and name of code Dynamo remembers which values changed; it would make them dynamic in other models.
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    copied = types.FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_numbers = count()


@contextmanager
def dynamic_dims(tensors: list[tuple[Tensor, int]]) -> Iterator[None]:
    """Mark dimensions of tensors as dynamic for calls inside of this. Afterwards the tensors are as before."""
    names = ("_dynamo_weak_dynamic_indices", "_has_dynamo_dim_marking")
    before = {id(tensor): (tensor, {name: vars(tensor).pop(name, None) for name in names}) for tensor, _ in tensors}
    try:
        for tensor, marks in before.values():
            for dim in marks[names[0]] or ():
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        for tensor, dim in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        yield
    finally:
        for tensor, marks in before.values():
            for name, mark in marks.items():
                vars(tensor).pop(name, None)
                if mark is not None:
                    vars(tensor)[name] = mark


def ensure_device_interface(device_type: str) -> None:
    """Register a minimal device interface with Dynamo if there is none: the bridge does so in eager mode only."""
    try:
        device_interface.get_interface_for_device(device_type)
    except NotImplementedError:
        module = torch.get_device_module(device_type)

        class Interface(device_interface.DeviceInterface):
            """The part of the interface that tracing uses."""

            @staticmethod
            def current_device() -> int:
                return int(module.current_device())

            @staticmethod
            def device_count() -> int:
                return int(module.device_count())

            @staticmethod
            def is_available() -> bool:
                return bool(module.is_available())

            @staticmethod
            def synchronize(device: Any = None) -> None:
                module.synchronize()

        device_interface.register_interface_for_device(device_type, Interface)


def is_static(node: Node) -> bool:
    """Whether a placeholder is a parameter or buffer of a module, which Dynamo passes with every call."""
    return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


def fake_value(node: Node) -> Any:
    """The fake tensor or symbolic number that Dynamo traced a node with; None if it is gone."""
    return node.meta.get("example_value")


def storage_of(tensor: Tensor) -> int:
    """An id of a tensor's storage: equal for tensors that share memory, while both live. Works for fake tensors."""
    return int(tensor.untyped_storage()._cdata)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor is dense and does not overlap itself. Works for fake tensors."""
    # Renamed in torch 2.9.
    names = ("is_non_overlapping_and_dense_or_false", "is_non_overlapping_and_dense")
    return bool(next(getattr(_prims_common, name) for name in names if hasattr(_prims_common, name))(tensor))


def sizes_of(tensor: Tensor) -> list[str | int]:
    """The sizes of a fake tensor: numbers, and the expressions of symbolic ones as text."""
    sizes: tuple[Any, ...] = tuple(tensor.shape)
    return [size if type(size) is int else str(size.node.expr) for size in sizes]


def number_as_text(value: Any) -> str:
    """A symbolic number's expression, or a plain number, as text."""
    return str(value.node.expr) if hasattr(value, "node") else str(value)


def mentions(size: str | int, symbols: Collection[str]) -> bool:
    """Whether a size, as `sizes_of` gives it, is computed from a symbol."""
    return isinstance(size, str) and not set(re.findall(r"\w+", size)).isdisjoint(symbols)


def users_line(nodes: Iterable[Node]) -> str:
    """The user's line that the first of some nodes comes from, as `, at file:line`; empty if that is not known."""
    return next((line for node in nodes if (line := _innermost(node.stack_trace or ""))), "")


def break_of(module: GraphModule) -> str:
    """Why a graph ends within the user's code, and where; empty if it ends with it, or this torch does not say."""
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    words = str(reason.reason).splitlines()[0].replace("generic_jump TensorVariable()", "a branch on a tensor's value")
    return f"{words}{line_of(reason)}"


def line_of(error: Any) -> str:
    """The user's line at which Dynamo met an error or a break, as `, at file:line`; empty if that is not known."""
    stack = getattr(error, "real_stack", None) or getattr(error, "user_stack", None) or ()
    frames = [f'File "{frame.filename}", line {frame.lineno}' for frame in stack]
    return _innermost("\n".join(frames)) or _innermost(str(error).partition("from user code")[2])


def _innermost(stack: str) -> str:
    """The last frame of a stack, as Python prints them, that is not in a library."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', stack)
    return next((f", at {file}:{line}" for file, line in reversed(frames) if not file.startswith(_LIBRARIES)), "")


def must_run_plainly() -> str:
    """Why nothing may be traced or replayed at this moment; empty if it may.

    Dynamo does not guard global module hooks (torch 2.13), and a replay bypasses dispatch and function modes.
    """
    m = nn_module
    if m._global_forward_hooks or m._global_forward_pre_hooks or m._global_forward_hooks_always_called:
        return "a global module hook is registered (`register_module_forward_hook`), which a replay would not call"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a TorchDispatchMode or TorchFunctionMode is active, which a replay would not pass through"
    return ""


def guard_gaps(device_type: str) -> tuple[Any, ...]:
    """Settings that ops read when they run. Dynamo does not guard them, and a captured graph does not read them."""
    c = torch._C
    return (
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        c._get_float32_matmul_precision(),
        c._get_cudnn_enabled(),
        c._get_cudnn_deterministic(),
        c._get_cudnn_allow_tf32(),
        c._get_mkldnn_enabled(),
        c._get_math_sdp_enabled(),
        c._get_flash_sdp_enabled(),
        c._get_mem_efficient_sdp_enabled(),
        c._get_cublas_allow_fp16_reduced_precision_reduction(),
        c._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch.is_anomaly_enabled(),
    )


class ClassFunctions:
    """Detects patched methods of classes, which Dynamo does not guard (torch 2.13).

    Args:
        classes: Classes of modules. Their bases are watched too, but of torch's only the functions that call a module.
    """

    def __init__(self, classes: Iterable[type]) -> None:
        bases = dict.fromkeys(base for kind in classes for base in kind.__mro__ if base is not object)
        self._looked_up = [
            # Names are not counted in torch's classes, since Dynamo adds some to them.
            (() if of_torch else vars(base), vars(base), getter)
            for base in bases
            for of_torch in (base.__module__.startswith("torch."),)
            if (getter := _functions_of(base, only_calling=of_torch)) is not None
        ]

    def now(self) -> tuple[Any, ...]:
        """The functions, and how many names each class has; equal as long as nothing was patched."""
        return tuple([(len(counted), getter(names)) for counted, names, getter in self._looked_up])


def _functions_of(kind: type, *, only_calling: bool) -> Callable[[Any], Any] | None:
    kinds = (types.FunctionType, classmethod, staticmethod, property)
    calling = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
    found = (name for name, value in vars(kind).items() if isinstance(value, kinds))
    names = [name for name in found if name in calling or not only_calling]
    return itemgetter(*names) if names else None


def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module with its hooks, but not what `nn.Module.compile`, or `CallSites`, set as its implementation."""
    return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
