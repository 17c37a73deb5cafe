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
from torch.utils._pytree import tree_leaves

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
        state: The tensors that the network keeps.
    """

    def __init__(self, inputs: Iterable[object], state: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept: list[Any] = []  # as long as their ids are compared
        self._owners: dict[int, str] = {}
        for what, tensors in (("its own state", state), ("its input", inputs)):
            for tensor in tensors:
                self._owned(tensor, what)
        self.found = ""
        """The first such op, what is wrong with it, and the user's line that called it."""
        self.changed = ""
        """Likewise, the first op that changes what outlives the call: it must not run twice."""

    def _owned(self, tensor: object, what: str) -> None:
        self._kept.append(tensor)
        self._owners[id(tensor)] = what

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one op and run it."""
        kwargs = kwargs or {}
        if not self.found and (what := self._problem(func, args, kwargs)):
            self.found = f"{what} ({func}, {_users_line()})"
        if not self.changed and (owner := self._written(func, args, kwargs)):
            self.changed = f"it changes {owner} in place ({func}, {_users_line()})"
        output = func(*args, **kwargs)
        # A view of what is owned is owned: inference mode keeps no other record of it.
        if args and id(args[0]) in self._owners and any(each.alias_info for each in func._schema.returns):
            for tensor in tree_leaves(output):
                self._owned(tensor, self._owners[id(args[0])])
        return output

    def _written(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Whose tensor an op writes to, if it is somebody's."""
        if not func._schema.is_mutable:
            return ""
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(given):
                    if id(tensor) in self._owners:
                        return self._owners[id(tensor)]
        return ""

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
        return ""


def _users_line() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_OWN_FOLDERS):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "unknown line"
