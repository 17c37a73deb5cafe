"""Watching what a step and its networks do, before anything is captured."""

import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

_OWN_FOLDERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
_READS = {"aten::item", "aten::is_nonzero", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::to"}


@contextmanager
def outermost_calls() -> Iterator[list[nn.Module]]:
    """Collects the modules that this thread calls, without those that they call in turn."""
    called: list[nn.Module] = []
    thread = threading.get_ident()
    depth = 0

    def enter(module: nn.Module, _: object) -> None:
        nonlocal depth
        if threading.get_ident() == thread:
            if depth == 0:
                called.append(module)
            depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        if threading.get_ident() == thread:
            depth -= 1

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds what a graph would get wrong: ops that read the device, cross over to it, or change an input in place.

    On hardware none of them fails in a capture. The value that was read, or copied, is recorded once and stays
    (bridge `lazy_kernels.cpp`: a read splits the capture and its value is baked into Python's flow).

    Args:
        inputs: The tensors that the watched call is given.
    """

    def __init__(self, inputs: Iterable[object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = {id(tensor) for tensor in inputs}
        self.found = ""
        """The first such op, what is wrong with it, and the user's line that called it."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one op and run it."""
        kwargs = kwargs or {}
        if not self.found and (what := self._problem(func, args, kwargs)):
            self.found = f"{what} ({func}, {_users_line()})"
        return func(*args, **kwargs)

    def _problem(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        name = func._schema.name
        if name in _COPIES:
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            devices = {tensor.device.type for tensor in tensors}
            if isinstance(device := kwargs.get("device"), torch.device):
                devices.add(device.type)
            if len(devices) > 1:
                return "it copies between host and device"
        elif name in _INDEXING:
            indices = args[1] if isinstance(args[1], list | tuple) else ()
            if any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices):
                return "it indexes with a mask, whose size depends on values"
        elif name in _READS or {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            return "it reads values of the device"
        if func._schema.is_mutable and args and id(args[0]) in self._inputs:
            return "it changes its input in place"
        return ""


def _users_line() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_OWN_FOLDERS):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "unknown line"
