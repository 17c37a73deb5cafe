"""What the ops of an FX graph do, found by running it on its fake tensors: writes, views, random numbers, devices."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from lightning_hpu_infer import _torch
from lightning_hpu_infer.nested import tensors_in

_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Arguments that make an op draw no random numbers although it is tagged as one that may.
_NOT_RANDOM = (("dropout_p", 0.0), ("p", 0.0), ("train", False), ("training", False))
# Host tensors up to this size, in bytes, may be inputs of a captured part, which is valid for their values only.
_MAX_HOST_BYTES = 2**23
# Functions that copy literals of the code to the device.
_FROM_LITERALS = (torch.tensor, torch.as_tensor, torch.asarray)
# Switches of modes around ops. They depend on no tensor, and both parts of a graph need them.
_SWITCHES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


class NotCapturable(Exception):
    """Raised when no part of a graph can be captured; its message says why."""


class _Recorder(_torch.Dispatch):  # type: ignore[no-untyped-call]
    """Records the ops that one node of a torch-level graph dispatches to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()
        self.problem = ""
        self.random = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record one op."""
        kwargs = kwargs or {}
        self.written.update(_written(func, args, kwargs))
        if func._schema.name == "aten::set_":
            # It must not run twice for a comparison either.
            self.random, self.problem = True, f"it replaces the memory of a tensor ({func})"
            return func(*args, **kwargs)
        if _is_random(func, args, kwargs):
            self.random = True
            self.problem = f"it draws random numbers ({func})"
        elif func._schema.name in _INDEXING and _indexes_with_mask(args):
            self.problem = f"it indexes with a mask, whose size depends on values ({func})"
        return func(*args, **kwargs)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[tuple[Any, Any]]:
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[int]:
    for argument, given in _arguments(func, args, kwargs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from map(_torch.storage_of, tensors_in(given))
    # The schemas of normalisations do not tell that they update their statistics.
    given = {argument.name: value for argument, value in _arguments(func, args, kwargs)}
    if any(given.get(name) is True for name in ("training", "train", "use_input_stats")):
        for name in ("running_mean", "running_var"):
            if isinstance(given.get(name), Tensor):
                yield _torch.storage_of(given[name])


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    given = {argument.name: value for argument, value in _arguments(func, args, kwargs)}
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return not any(given.get(name, defaults.get(name)) == value for name, value in _NOT_RANDOM if name in defaults)


def _indexes_with_mask(args: tuple[Any, ...]) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


class Examination(Interpreter):
    """Runs a graph on its fake tensors and sorts its nodes. `env` has the fake value of each. Main thread only.

    Args:
        module: A graph as Dynamo hands it to a backend: its placeholders carry fake tensors or symbolic numbers.
        device_type: The type of the device that captures.

    Raises:
        NotCapturable: If an input is neither a tensor nor a number, or an op cannot run on fake tensors.
    """

    def __init__(self, module: GraphModule, device_type: str) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.nodes: list[Node] = list(module.graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.results: list[Node] = self.nodes[-1].all_input_nodes
        self.writes: dict[Node, set[int]] = {}
        """Per node, the memory that it writes to."""
        self.written: set[int] = set()
        """All memory that is written to."""
        self.plain: dict[Node, str] = {}
        """Nodes that must not be captured, with the reason."""
        self.switches: set[Node] = set()
        self.base: dict[int, Node] = {}
        """Per storage, the first node that shows it."""
        self.views: set[Node] = set()
        """Nodes that compute nothing and only show storages of other nodes."""
        self.constant: set[Node] = set()
        """Nodes on the host that depend on literals and host inputs alone."""
        self.random = False
        """Whether any op draws random numbers, or must not run twice for another reason."""
        self._device_type = device_type
        self._examine()

    def _examine(self) -> None:
        values = [_torch.fake_value(node) for node in self.placeholders]
        for node, value in zip(self.placeholders, values, strict=True):
            if not isinstance(value, Tensor | int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
                raise NotCapturable(f"its input `{node.name}` is neither a tensor nor a number")
        with ExitStack() as stack:
            for mode in {value.fake_mode for value in values if isinstance(value, _torch.FakeTensor)}:
                stack.enter_context(mode)
            try:
                self.run(*values)
            except Exception as error:
                raise NotCapturable(f"its ops could not be examined ({type(error).__name__}: {error})") from error

    def computes(self, node: Node) -> bool:
        """Whether a node is work for a device, or has an effect."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return False
        if node in self.switches or node in self.constant:
            return False
        tensors = next(tensors_in(self.env[node]), None) is not None
        return bool(self.writes[node]) or (node not in self.views and tensors)

    def inputs_in(self, storages: set[int]) -> tuple[int, ...]:
        """The positions of the inputs that show any of some memory."""
        values = ((slot, self.env[node]) for slot, node in enumerate(self.placeholders))
        return tuple(i for i, value in values if isinstance(value, Tensor) and _torch.storage_of(value) in storages)

    def returned(self) -> tuple[Tensor, ...]:
        """The fake tensors that the graph returns; empty if it returns anything else too."""
        (nodes,) = self.nodes[-1].args
        values = [self.env[node] if isinstance(node, Node) else node for node in cast(Sequence[Any], nodes)]
        return tuple(values) if all(isinstance(value, Tensor) for value in values) else ()

    def run_node(self, n: Node) -> Any:
        """Run one node on fake tensors and note what it does."""
        with _Recorder() as ops:
            value = super().run_node(n)
        self.writes[n] = ops.written
        self.written |= ops.written
        self.random |= ops.random
        if any(name in getattr(n.target, "__name__", "") for name in _SWITCHES):
            self.switches.add(n)
            return value
        tensors = list(tensors_in(value))
        known = all(_torch.storage_of(tensor) in self.base for tensor in tensors)
        if n.op in ("call_function", "call_method") and known and not ops.written:
            self.views.add(n)
        if n.op != "output" and isinstance(value, Tensor):
            self.base.setdefault(_torch.storage_of(value), n)
        if n.op != "output":
            inherited = next((self.plain[given] for given in n.all_input_nodes if given in self.plain), "")
            if reason := inherited or ops.problem or self._problem(n, tensors):
                self.plain[n] = inherited or f"{reason}{_torch.users_line([n])}"
        return value

    def _problem(self, node: Node, tensors: list[Tensor]) -> str:
        """Why a node must not be captured, whatever its inputs are; empty if it may."""
        if self._is_constant(node, tensors):
            self.constant.add(node)
            return ""
        device = next((tensor.device for tensor in tensors if tensor.device.type != self._device_type), None)
        if device is not None:
            if node.op == "placeholder":
                return f"its input `{node.name}` is on {device}, and a graph would repeat the first value"
            return f"it works on {device} ({node.target})"
        # A view of a weight requires gradients in inference mode too.
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) and node.op != "placeholder":
            return "it records gradients"
        return ""

    def _is_constant(self, node: Node, tensors: list[Tensor]) -> bool:
        if not tensors or self.writes[node] or any(tensor.device.type != "cpu" for tensor in tensors):
            return False
        if node.op == "placeholder":
            return bool(sum(tensor.numel() * tensor.itemsize for tensor in tensors) <= _MAX_HOST_BYTES)
        given = node.all_input_nodes
        memory = {_torch.storage_of(self.env[each]) for each in given if isinstance(self.env[each], Tensor)}
        return memory.isdisjoint(self.written) and all(each in self.constant for each in given)

    def is_written_copy(self, node: Node) -> bool:
        """Whether a node copies values of the host to the device, where an op of the graph writes to the copy."""
        value, given = self.env[node], node.all_input_nodes
        if not isinstance(value, Tensor) or node in self.constant or _torch.storage_of(value) not in self.written:
            return False
        from_host = all(each in self.constant for each in given) if given else node.target in _FROM_LITERALS
        return from_host and self.base[_torch.storage_of(value)] is node

    def is_effect(self, node: Node) -> bool:
        """Whether a node has no result and writes to no tensor, such as an assertion."""
        if node.op not in ("call_function", "call_method", "call_module") or self.env[node] is not None:
            return False
        harmless = node in self.switches or "_log_api_usage" in getattr(node.target, "__name__", "")
        return not (harmless or node.users or self.writes[node])
