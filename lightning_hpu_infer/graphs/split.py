"""What of an FX graph a device graph may repeat: a captured part, and the rest, which runs as it is afterwards."""

import operator
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from lightning_hpu_infer import _torch

_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Arguments that make an op draw no random numbers although it is tagged as one that may.
_NOT_RANDOM = (("dropout_p", 0.0), ("p", 0.0), ("train", False), ("training", False))
# Host tensors up to this size, in bytes, may be inputs of a captured part, which is good for their values only.
_MAX_HOST_BYTES = 2**23
# Switches of a mode that surround ops. They depend on no tensor, and both parts need them.
_SWITCHES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode")


@dataclass(frozen=True)
class Split:
    """An FX graph in two parts, which together do what it does.

    Both take all of the graph's inputs; `rest` takes the results of `captured` too.
    """

    captured: GraphModule | None
    """Device ops only, whose results are new tensors. None if there is nothing that a graph may repeat."""

    results: tuple[Tensor, ...]
    """The fake tensors that `captured` returns."""

    rest: GraphModule | None
    """What runs plainly behind it: views of inputs, copies to the host, random ops. None if there is nothing."""

    reason: str
    """Why something runs plainly, in words, with the op; empty if only views do."""

    written: tuple[int, ...]
    """Places of the inputs whose memory `captured` writes to."""

    hosted: tuple[int, ...]
    """Places of host tensors whose values `captured` depends on."""

    random: bool
    """Whether any op of the graph draws random numbers, so that it cannot be run twice for comparison."""

    outputs: tuple[Tensor, ...] = ()
    """The fake tensors that the whole graph returns; empty if it returns anything else too."""


def split(module: GraphModule, device_type: str) -> Split:
    """Find what of a graph may be captured.

    Args:
        module: A graph as Dynamo hands it to a backend: its placeholders carry fake tensors or symbolic numbers.
        device_type: The type of the device that captures.
    """
    _rewrite_masks(module)
    return _Splitter(module, device_type).split()


def _rewrite_masks(module: GraphModule) -> None:
    """Make `x[mask] = number` a `masked_fill_`, which does the same and does not ask how much of the mask is set."""
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is not operator.setitem or not isinstance(node.args[1], Node):
            continue
        changed, mask, number = node.args
        given, values = _torch.fake_value(changed), _torch.fake_value(mask)
        if (
            isinstance(given, Tensor)
            and isinstance(values, Tensor)
            and isinstance(number, int | float)
            and values.dtype is torch.bool
            and values.device == given.device
            and values.shape == given.shape[: values.dim()]
        ):
            with module.graph.inserting_before(node):
                missing = (None,) * (given.dim() - values.dim())
                wide = (
                    module.graph.call_function(operator.getitem, (mask, cast(Any, (Ellipsis, *missing))))
                    if missing
                    else mask
                )
                filled = module.graph.call_method("masked_fill_", (changed, wide, number))
            node.replace_all_uses_with(filled)
            module.graph.erase_node(node)
    module.recompile()


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


class _Splitter(Interpreter):
    """Runs a graph on its fake tensors, and sorts its nodes."""

    def __init__(self, module: GraphModule, device_type: str) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._nodes: list[Node] = list(module.graph.nodes)
        self._device_type = device_type
        self._recorder = _Recorder()
        self._order: dict[Node, int] = {}
        self._writes: dict[Node, set[int]] = {}
        self._plain: dict[Node, str] = {}
        """Nodes that must not be captured, with the reason."""
        self._switches: set[Node] = set()
        self._base: dict[int, Node] = {}
        """Per memory: the first node that showed it."""
        self._views: set[Node] = set()
        """Nodes that compute nothing and only show memory that was there before."""
        self._constant: set[Node] = set()
        """Nodes on the host that depend on literals and host inputs alone: the same whenever those are the same."""
        self._random = False

    # Analysis

    def split(self) -> Split:
        """Sort the nodes and build both parts."""
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        values = [_torch.fake_value(node) for node in placeholders]
        nothing = Split(None, (), None, "", (), (), True)
        missing = next((n for n, v in zip(placeholders, values, strict=True) if not _is_known(v)), None)
        if missing is not None:
            return _with_reason(nothing, f"its input `{missing.name}` is neither a tensor nor a number")
        modes = {value.fake_mode for value in values if isinstance(value, _torch.FakeTensor)}
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            stack.enter_context(self._recorder)
            try:
                self.run(*values)
            except Exception as error:
                return _with_reason(nothing, f"its ops could not be examined ({type(error).__name__}: {error})")
            results = [self.env[node] for node in _nodes_in(self._nodes[-1].args)]
            outputs = tuple(results) if all(isinstance(result, Tensor) for result in results) else ()
            return replace(self._parts(placeholders), outputs=outputs)

    def run_node(self, n: Node) -> Any:
        """Run one node on fake tensors and note what it does."""
        self._recorder.begin()
        value = super().run_node(n)
        self._order[n] = len(self._order)
        self._writes[n] = self._recorder.written
        self._random |= self._recorder.random
        if any(name in getattr(n.target, "__name__", "") for name in _SWITCHES):
            self._switches.add(n)
            return value
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        known = all(_torch.storage_of(tensor) in self._base for tensor in tensors)
        if n.op in ("call_function", "call_method") and known and not self._recorder.written:
            self._views.add(n)
        if n.op != "output" and isinstance(value, Tensor):
            self._base.setdefault(_torch.storage_of(value), n)
        if n.op != "output":
            inherited = next((self._plain[given] for given in n.all_input_nodes if given in self._plain), "")
            if reason := inherited or self._problem(n, tensors):
                self._plain[n] = inherited or f"{reason}{_torch.users_line([n])}"
        return value

    def _problem(self, node: Node, tensors: list[Tensor]) -> str:
        """Why a node must not be captured, by itself."""
        if self._recorder.problem:
            return self._recorder.problem
        if self._is_constant(node, tensors):
            self._constant.add(node)
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
        if not tensors or self._writes[node] or any(tensor.device.type != "cpu" for tensor in tensors):
            return False
        if node.op == "placeholder":
            return bool(sum(tensor.numel() * tensor.itemsize for tensor in tensors) <= _MAX_HOST_BYTES)
        return all(given in self._constant for given in node.all_input_nodes)

    # Construction

    def _parts(self, placeholders: list[Node]) -> Split:
        nodes = self._nodes
        results = list(_nodes_in(nodes[-1].args))
        reason = next(iter(self._plain[node] for node in nodes if node in self._plain and not self._is_idle(node)), "")
        captured = [node for node in nodes if self._computes(node) and node not in self._plain]
        plain = [node for node in nodes if self._computes(node) and node in self._plain]
        nothing = Split(None, (), None, reason, (), (), self._random)
        if not captured or len(captured) < len(plain):
            return nothing
        if plain and not self._commute(nodes):
            return _with_reason(nothing, f"{reason}, beside ops that write to the same memory")
        needs = _Needs(self, placeholders)
        try:
            for node in (*plain, *results):
                needs.add(node)
        except _NotSplittable as error:
            return _with_reason(nothing, str(error))
        exports = sorted(needs.exports, key=self._order.__getitem__)
        if any(not isinstance(self.env[node], Tensor) for node in exports):
            return _with_reason(nothing, "a result is no tensor")
        simple = (
            not needs.later
            and not needs.same
            and tuple(results) == tuple(exports)
            and nodes[-1].args == (tuple(exports),)
        )
        written = {storage for node in captured for storage in self._writes[node]}
        places = tuple(
            place
            for place, node in enumerate(placeholders)
            if isinstance(self.env[node], Tensor) and _torch.storage_of(self.env[node]) in written
        )
        inside = self._captured_nodes(captured, exports)
        used = {given for node in inside for given in node.all_input_nodes}
        return Split(
            self._build(placeholders, inside, exports, None, {}),
            tuple(self.env[node] for node in exports),
            None if simple else self._build(placeholders, needs.later | self._switches, exports, nodes[-1], needs.same),
            reason,
            places,
            tuple(i for i, node in enumerate(placeholders) if node in self._constant and node in used),
            self._random,
        )

    def _is_idle(self, node: Node) -> bool:
        return node.op == "placeholder" and not node.users

    def _computes(self, node: Node) -> bool:
        """Whether a node is work for a device, or has an effect."""
        if node.op not in ("call_function", "call_method", "call_module") or node in self._switches:
            return False
        if node in self._constant:
            return False
        if self._writes[node]:
            return True
        value = self.env[node]
        return node not in self._views and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))

    def _commute(self, nodes: list[Node]) -> bool:
        """Whether all captured nodes may run before all plain ones: they do not write what the others use."""
        read_later: set[int] = set()
        written_later: set[int] = set()
        for node in nodes:
            if not self._computes(node):
                continue
            used = {
                _torch.storage_of(self.env[given])
                for given in node.all_input_nodes
                if isinstance(self.env[given], Tensor)
            }
            if node in self._plain:
                read_later |= used
                written_later |= self._writes[node]
            elif self._writes[node] & (read_later | written_later) or used & written_later:
                return False
        return True

    def _captured_nodes(self, captured: list[Node], exports: list[Node]) -> set[Node]:
        """The captured ops with all that leads to them, and the views that lead to the results."""
        found: set[Node] = set(self._switches)
        open_nodes = [*captured, *exports]
        while open_nodes:
            node = open_nodes.pop()
            if node not in found and node.op != "placeholder":
                found.add(node)
                open_nodes += node.all_input_nodes
        return found

    def _build(
        self,
        placeholders: list[Node],
        nodes: set[Node],
        exports: list[Node],
        output: Node | None,
        same: dict[Node, Node],
    ) -> GraphModule:
        """A graph of some nodes; without `output` it returns the exports, with it they are further inputs.

        `same` has nodes in whose place another one stands.
        """
        graph, copied = Graph(), dict[Node, Node]()
        for node in placeholders:
            copied[node] = graph.placeholder(node.name)
        if output is not None:
            for node in exports:
                copied[node] = graph.placeholder(f"{node.name}_captured")
        for node in self._nodes:
            if node in nodes and node not in copied:
                copied[node] = graph.node_copy(node, copied.__getitem__)
            elif node in same:
                copied[node] = copied[same[node]]
        if output is None:
            graph.output(tuple(copied[node] for node in exports))
        else:
            graph.output(torch.fx.map_arg(output.args[0], copied.__getitem__))
        return GraphModule(self.module, graph)


class _NotSplittable(Exception):
    """Raised when the results of a graph cannot be made from those of a captured part."""


class _Needs:
    """What the second part takes over from the first, and what it does again because it is a view.

    A result that shares memory with an input, or with another result, must go on doing so: it is made anew as a view of
    the input or of the copied result. Any other result is handed over as it is.
    """

    def __init__(self, splitter: _Splitter, placeholders: list[Node]) -> None:
        self._of = splitter
        self._inputs = {
            _torch.storage_of(splitter.env[node]) for node in placeholders if isinstance(splitter.env[node], Tensor)
        }
        results = list(_nodes_in(splitter._nodes[-1].args))
        seen: dict[int, Node] = {}
        self._shared: set[int] = set()
        for node in dict.fromkeys((*results, *splitter._plain)):
            if isinstance(splitter.env[node], Tensor):
                storage = _torch.storage_of(splitter.env[node])
                if seen.setdefault(storage, node) is not node:
                    self._shared.add(storage)
        self.exports: set[Node] = set()
        self.later: set[Node] = set()
        self.same: dict[Node, Node] = {}
        """Results of ops in place, and the node that shows the same memory."""

    def add(self, node: Node) -> None:
        """Make the value of a node available to the second part."""
        of = self._of
        if node.op == "placeholder" or node in self.later or node in self.exports or node in self.same:
            return
        value = of.env[node]
        again = node in of._plain or node in of._switches or node in of._constant or node.op == "get_attr"
        if again or not isinstance(value, Tensor):
            self._again(node)
            return
        storage = _torch.storage_of(value)
        if storage not in self._inputs and (storage not in self._shared or of._base[storage] is node):
            self.exports.add(node)
        elif node in of._views:
            self._again(node)
        elif (same := next((given for given in node.all_input_nodes if self._is_same(given, value)), None)) is not None:
            self.same[node] = same
            self.add(same)
        else:
            raise _NotSplittable(f"its result `{node.name}` is a part of changed memory")

    def _is_same(self, node: Node, value: Tensor) -> bool:
        other = self._of.env[node]
        return isinstance(other, Tensor) and _layout(other) == _layout(value)

    def _again(self, node: Node) -> None:
        if self._of._computes(node) and node not in self._of._plain:
            raise _NotSplittable(f"its result `{node.name}` has several parts of one memory")
        self.later.add(node)
        for given in node.all_input_nodes:
            self.add(given)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return _torch.storage_of(tensor), tensor.shape, tensor.stride(), tensor.storage_offset()


def _is_known(value: Any) -> bool:
    return isinstance(value, Tensor | int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _nodes_in(arguments: Any) -> Iterable[Node]:
    return dict.fromkeys(leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Node))


def _with_reason(nothing: Split, reason: str) -> Split:
    return Split(None, (), None, reason, (), (), nothing.random)
