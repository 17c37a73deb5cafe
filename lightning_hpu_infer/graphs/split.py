"""What of an FX graph a device graph may repeat: a captured part, and the rest, which runs plainly afterwards."""

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lightning_hpu_infer import _torch
from lightning_hpu_infer.graphs.examine import Examination, NotCapturable


@dataclass(frozen=True)
class Split:
    """An FX graph in two parts, which together do what it does.

    Both take all of the graph's inputs; `rest` takes the results of `captured` too.
    """

    captured: GraphModule | None
    """Device ops only, whose results are new tensors. None if there is nothing that a device graph may repeat."""

    results: tuple[Tensor, ...]
    """The fake tensors that `captured` returns."""

    rest: GraphModule | None
    """What runs plainly after it: views of inputs, copies to the host, random ops. None if there is nothing."""

    reason: str
    """Why something runs plainly, in words, with the op; empty if only views do."""

    written: tuple[int, ...]
    """Positions of the inputs whose memory `captured` writes to."""

    hosted: tuple[int, ...]
    """Positions of the host tensors whose values `captured` depends on."""


def split(module: GraphModule, device_type: str) -> Split:
    """Find what of a graph may be captured.

    Args:
        module: A graph as Dynamo hands it to a backend, after `rewrite_masks`: its placeholders carry fake tensors or
            symbolic numbers.
        device_type: The type of the device that captures.
    """
    try:
        return _parts(Examination(module, device_type))
    except NotCapturable as reason:
        return Split(None, (), None, str(reason), (), ())


def rewrite_masks(module: GraphModule) -> None:
    """Replace `x[mask] = number` by a `masked_fill_`, which does the same and needs no count of the mask's elements.

    Args:
        module: A graph as Dynamo hands it to a backend; changed in place.
    """
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
                if missing := given.dim() - values.dim():
                    mask = module.graph.call_function(
                        operator.getitem, (mask, cast(Any, (Ellipsis, *[None] * missing)))
                    )
                filled = module.graph.call_method("masked_fill_", (changed, mask, number))
            node.replace_all_uses_with(filled)
            module.graph.erase_node(node)
    module.recompile()


def _parts(graph: Examination) -> Split:
    """Sort the nodes and build both parts."""
    reason = next((graph.plain[node] for node in graph.nodes if node in graph.plain and _is_used(node)), "")
    if (effect := next(filter(graph.is_effect, graph.nodes), None)) is not None:
        raise NotCapturable(f"it has an op without a result ({effect.target}){_torch.users_line([effect])}")
    captured = [node for node in graph.nodes if graph.computes(node) and node not in graph.plain]
    plain = [node for node in graph.nodes if graph.computes(node) and node in graph.plain]
    if not captured or len(captured) < len(plain):
        raise NotCapturable(reason)
    if plain and not _commute(graph):
        raise NotCapturable(f"{reason}, beside ops that write to the same memory")
    needs = _Needs(graph)
    for node in (*plain, *graph.results):
        needs.add(node)
    exports = [node for node in graph.nodes if node in needs.exports]
    inside = _leading_to([*captured, *exports]) | graph.switches
    used = {given for node in inside for given in node.all_input_nodes}
    written = {storage for node in captured for storage in graph.writes[node]}
    rest: GraphModule | None = None
    if needs.later or needs.same or graph.nodes[-1].args != (tuple(exports),):
        rest = _build(graph, needs.later | graph.switches, exports, needs.same)
    return Split(
        captured=_build(graph, inside, exports, None),
        results=tuple(graph.env[node] for node in exports),
        rest=rest,
        reason=reason,
        written=graph.inputs_in(written),
        hosted=tuple(slot for slot, n in enumerate(graph.placeholders) if n in graph.constant and n in used),
    )


def _is_used(node: Node) -> bool:
    return node.op != "placeholder" or bool(node.users)


def _commute(graph: Examination) -> bool:
    """Whether all captured nodes may run before all plain ones: they do not write what the others use."""
    read_later: set[int] = set()
    written_later: set[int] = set()
    for node in filter(graph.computes, graph.nodes):
        values = (graph.env[given] for given in node.all_input_nodes)
        used = {_torch.storage_of(value) for value in values if isinstance(value, Tensor)}
        if node in graph.plain:
            read_later |= used
            written_later |= graph.writes[node]
        elif graph.writes[node] & (read_later | written_later) or used & written_later:
            return False
    return True


def _leading_to(nodes: list[Node]) -> set[Node]:
    """Nodes with all that leads to them, but for inputs."""
    found: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node not in found and node.op != "placeholder":
            found.add(node)
            nodes += node.all_input_nodes
    return found


def _build(graph: Examination, nodes: set[Node], exports: list[Node], same: dict[Node, Node] | None) -> GraphModule:
    """A graph of some nodes. The captured one returns the exports.

    The rest takes them as further inputs, and `same` maps some of its nodes to others that replace them.
    """
    built, copied = Graph(), dict[Node, Node]()
    for node in graph.placeholders:
        copied[node] = built.placeholder(node.name)
    if same is not None:
        for node in exports:
            copied[node] = built.placeholder(f"{node.name}_captured")
    for node in graph.nodes:
        if node in nodes and node not in copied:
            copied[node] = built.node_copy(node, copied.__getitem__)
            if same is None and graph.is_written_copy(node):
                # A replay neither runs Python nor reads the host again: what is written to is a copy of the copy.
                copied[node] = built.call_method("clone", (copied[node],))
        elif same is not None and node in same:
            copied[node] = copied[same[node]]
    if same is None:
        built.output(tuple(copied[node] for node in exports))
    else:
        built.output(torch.fx.map_arg(graph.nodes[-1].args[0], copied.__getitem__))
    return GraphModule(graph.module, built)


class _Needs:
    """What the second part takes from the first, and which views it makes again.

    A result that shares memory with an input, or with another result, must still do so: it becomes a view of the input
    or of the copied result. Any other result is passed on as it is.
    """

    def __init__(self, graph: Examination) -> None:
        self._of = graph
        self._inputs = {
            _torch.storage_of(graph.env[node]) for node in graph.placeholders if isinstance(graph.env[node], Tensor)
        }
        seen: dict[int, Node] = {}
        self._shared: set[int] = set()
        for node in dict.fromkeys((*graph.results, *graph.plain)):
            if isinstance(graph.env[node], Tensor):
                storage = _torch.storage_of(graph.env[node])
                if seen.setdefault(storage, node) is not node:
                    self._shared.add(storage)
        self.exports: set[Node] = set()
        self.later: set[Node] = set()
        self.same: dict[Node, Node] = {}
        """Results of in-place ops, and the node that shows the same memory."""

    def add(self, node: Node) -> None:
        """Make the value of a node available to the second part."""
        of = self._of
        if node.op == "placeholder" or node in self.later or node in self.exports or node in self.same:
            return
        value = of.env[node]
        again = node in of.plain or node in of.switches or node in of.constant or node.op == "get_attr"
        if again or not isinstance(value, Tensor):
            self._again(node)
            return
        storage = _torch.storage_of(value)
        # A copy of a view that is not dense, or overlaps itself, would be another kind of tensor.
        alone = storage not in self._shared and (node not in of.views or _torch.is_dense(value))
        if storage not in self._inputs and (alone or of.base[storage] is node):
            self.exports.add(node)
        elif node in of.views:
            self._again(node)
        elif (same := next((given for given in node.all_input_nodes if self._is_same(given, value)), None)) is not None:
            self.same[node] = same
            self.add(same)
        else:
            raise NotCapturable(f"its result `{node.name}` is a part of changed memory")

    def _is_same(self, node: Node, value: Tensor) -> bool:
        other = self._of.env[node]
        return isinstance(other, Tensor) and _layout(other) == _layout(value)

    def _again(self, node: Node) -> None:
        if self._of.computes(node) and node not in self._of.plain:
            raise NotCapturable(f"its result `{node.name}` has several parts of one memory")
        self.later.add(node)
        for given in node.all_input_nodes:
            self.add(given)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return _torch.storage_of(tensor), tensor.shape, tensor.stride(), tensor.storage_offset()
