"""What the ops of an FX graph do, found by running it on its fake tensors: writes, views, random numbers, devices."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from lightning_hpu_infer import _torch

_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Arguments that make an op draw no random numbers although it is tagged as one that may.
_NOT_RANDOM = (("dropout_p", 0.0), ("p", 0.0), ("train", False), ("training", False))
# Host tensors up to this size, in bytes, may be inputs of a captured part, which is good for their values only.
_MAX_HOST_BYTES = 2**23
# Switches of a mode that surround ops. They depend on no tensor, and every part of a graph needs them.
_SWITCHES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


class NotExaminable(Exception):
    """Raised when the ops of a graph cannot be examined; its message says why."""


class _Recorder(_torch.Dispatch):  # type: ignore[no-untyped-call]
    """Sees the ops that a node of a torch-level graph comes down to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()
        self.problem = ""
        self.random = False

    def begin(self) -> None:
        """Begin another node."""
        self.written, self.problem, self.random = set(), "", False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one op."""
        kwargs = kwargs or {}
        self.written.update(_written(func, args, kwargs))
        if func._schema.name == "aten::set_":
            # Nor may it be run twice for a comparison.
            self.random, self.problem = True, f"it replaces the memory of a tensor ({func})"
            return func(*args, **kwargs)
        if _is_random(func, args, kwargs):
            self.random = True
            self.problem = f"it draws random numbers ({func})"
        elif func._schema.name in _INDEXING and _indexes_with_mask(args):
            self.problem = f"it indexes with a mask, whose size depends on values ({func})"
        return func(*args, **kwargs)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[tuple[Any, Any]]:
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            yield argument, args[place]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[int]:
    for argument, given in _arguments(func, args, kwargs):
        if argument.alias_info is not None and argument.alias_info.is_write:
            for tensor in tree_leaves(given):
                if isinstance(tensor, Tensor):
                    yield _torch.storage_of(tensor)
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
    """Runs a graph on its fake tensors and sorts its nodes. `env` has the fake value of each.

    Args:
        module: A graph as Dynamo hands it to a backend: its placeholders carry fake tensors or symbolic numbers.
        device_type: The type of the device that captures.

    Raises:
        NotExaminable: If an input is neither a tensor nor a number, or an op cannot run on fake tensors.
    """

    def __init__(self, module: GraphModule, device_type: str) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.nodes: list[Node] = list(module.graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.results = list(nodes_in(self.nodes[-1].args))
        self.order: dict[Node, int] = {}
        self.writes: dict[Node, set[int]] = {}
        """Per node, the memory that it writes to."""
        self.plain: dict[Node, str] = {}
        """Nodes that must not be captured, with the reason."""
        self.switches: set[Node] = set()
        self.base: dict[int, Node] = {}
        """Per memory, the first node that showed it."""
        self.views: set[Node] = set()
        """Nodes that compute nothing and only show memory that was there before."""
        self.constant: set[Node] = set()
        """Nodes on the host that depend on literals and host inputs alone: the same whenever those are the same."""
        self.random = False
        """Whether any op draws random numbers, or must not be run twice for another reason."""
        self._written: set[int] = set()
        """The memory that was written so far."""
        self._device_type = device_type
        self._recorder = _Recorder()
        self._examine()

    def _examine(self) -> None:
        values = [_torch.fake_value(node) for node in self.placeholders]
        for node, value in zip(self.placeholders, values, strict=True):
            if not isinstance(value, Tensor | int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool):
                raise NotExaminable(f"its input `{node.name}` is neither a tensor nor a number")
        with ExitStack() as stack:
            for mode in {value.fake_mode for value in values if isinstance(value, _torch.FakeTensor)}:
                stack.enter_context(mode)
            stack.enter_context(self._recorder)
            try:
                self.run(*values)
            except Exception as error:
                raise NotExaminable(f"its ops could not be examined ({type(error).__name__}: {error})") from error

    def computes(self, node: Node) -> bool:
        """Whether a node is work for a device, or has an effect."""
        if node.op not in ("call_function", "call_method", "call_module"):
            return False
        if node in self.switches or node in self.constant:
            return False
        tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.env[node]))
        return bool(self.writes[node]) or (node not in self.views and tensors)

    def run_node(self, n: Node) -> Any:
        """Run one node on fake tensors and note what it does."""
        self._recorder.begin()
        value = super().run_node(n)
        self.order[n] = len(self.order)
        self.writes[n] = self._recorder.written
        self._written |= self._recorder.written
        self.random |= self._recorder.random
        if any(name in getattr(n.target, "__name__", "") for name in _SWITCHES):
            self.switches.add(n)
            return value
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        known = all(_torch.storage_of(tensor) in self.base for tensor in tensors)
        if n.op in ("call_function", "call_method") and known and not self._recorder.written:
            self.views.add(n)
        if n.op != "output" and isinstance(value, Tensor):
            self.base.setdefault(_torch.storage_of(value), n)
        if n.op != "output":
            inherited = next((self.plain[given] for given in n.all_input_nodes if given in self.plain), "")
            if reason := inherited or self._problem(n, tensors):
                self.plain[n] = inherited or f"{reason}{_torch.users_line([n])}"
        return value

    def _problem(self, node: Node, tensors: list[Tensor]) -> str:
        """Why a node must not be captured, by itself."""
        if self._recorder.problem:
            return self._recorder.problem
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
        memory = {_torch.storage_of(self.env[given]) for given in node.all_input_nodes if self._is_tensor(given)}
        return memory.isdisjoint(self._written) and all(given in self.constant for given in node.all_input_nodes)

    def _is_tensor(self, node: Node) -> bool:
        return isinstance(self.env[node], Tensor)

    def is_effect(self, node: Node) -> bool:
        """Whether a node is there for what it does besides tensors, such as an assertion."""
        if node.op not in ("call_function", "call_method", "call_module") or self.env[node] is not None:
            return False
        harmless = node in self.switches or "_log_api_usage" in getattr(node.target, "__name__", "")
        return not (harmless or node.users or self.writes[node])


def nodes_in(arguments: Any) -> Iterable[Node]:
    """The nodes in nested arguments, each once, in order."""
    return dict.fromkeys(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Node))
