"""One FX graph as HPU graphs: captured once per cache key and set of weights, verified, replayed, bounded."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from lightning_hpu_infer import _habana, _torch
from lightning_hpu_infer.graphs.compare import Snapshot
from lightning_hpu_infer.graphs.context import GraphContext, in_words
from lightning_hpu_infer.graphs.padding import Padding
from lightning_hpu_infer.graphs.split import Split
from lightning_hpu_infer.graphs.store import Candidate, Captured, GraphStore, Key, WeightsGraphs, tensor_description
from lightning_hpu_infer.links import explained
from lightning_hpu_infer.observer import Stage

Arguments = tuple[Any, ...]

# Steps in a row with a new Python number, or new values on the host, after which no further traces are tried.
_MANY_VALUES = 4
# Times that weights are given other memory, after which nothing is captured any more.
_MANY_REPLACEMENTS = 3
# Sets of values of host inputs that are remembered.
_MAX_HOST_VALUES = 4


class CapturedGraph:
    """What Dynamo calls in place of one FX graph, in lazy mode.

    Weights and buffers are closed over and compared by identity in each call; the other inputs are passed to each
    replay. An input that the graph writes to and that is not a buffer, such as a cache of keys and values, is cloned
    for the graph; the clone is filled before each replay and copied back after it. Main thread only. The results are
    the caller's: nothing overwrites them.

    Args:
        module: The graph as Dynamo traced it.
        parts: What of it may be captured; `parts.captured` is not None.
        context: What the graphs of a run share.
    """

    def __init__(self, module: GraphModule, parts: Split, context: GraphContext) -> None:
        assert parts.captured is not None
        self._plain = module.forward
        self._captured = parts.captured.forward
        self._rest = parts.rest.forward if parts.rest is not None else None
        self._written = parts.written
        self._where = _torch.users_line(module.graph.nodes)
        self._context = context
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        values = [_torch.fake_value(node) for node in nodes]
        used = {node.name for node in parts.captured.graph.nodes if node.op == "placeholder" and node.users}
        tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor) and nodes[i].name in used]
        self._static_slots = [i for i in tensors if _torch.is_static(nodes[i])]
        self._carried: list[int] | None = None
        """Positions of the inputs that are written and are not buffers; found in the first call."""
        self._hosted = list(parts.hosted)
        self._host_values: list[tuple[int, list[Tensor]]] = []
        """Values of the host inputs, each with a number, newest first."""
        self._host_number = 0
        self._slots = [i for i in tensors if i not in self._static_slots and i not in parts.hosted]
        self._numbers = [i for i, value in enumerate(values) if not isinstance(value, Tensor) and nodes[i].name in used]
        self._statics = _getter(self._static_slots)
        self._store = GraphStore(context.replacements)
        context.register(self._store)
        self._calls = 0
        self._captured_in = -1
        self._misses, self._missed_in = 0, -1
        """Steps in a row in which a value was new, and the last of them."""
        self._padding: Padding | None = None
        if context.config.pad_batch and not parts.written:
            self._padding = Padding(context, parts.results, values, self._slots, self._numbers)

    def __call__(self, *args: Any) -> Any:
        """Replay the graph for these inputs, or run it plainly where it has no graph for them."""
        if self._context.capturing or torch.is_grad_enabled():
            return self._plain(*args)
        self._calls += 1
        if self._carried is None:
            self._carry(args)
        if self._carried and self._share_memory(args):
            return self._run_plainly(args, "it writes to memory that several of its inputs may share")
        found, key = self._store.find(self._statics(args), self._calls), self._key(args)
        graph = found.graphs.get(key)
        if graph is None:
            return self._context.timed(Stage.CAPTURE, self._without_graph, found, key, args)
        found.use(key, self._calls)
        if graph.to_verify:
            return self._context.timed(Stage.CAPTURE, self._verified, found, key, args)
        return self._finish(args, self._replay(graph, args))

    # Identity

    def _share_memory(self, args: Arguments) -> bool:
        """Whether inputs may share memory, so that a write to a clone would not be seen by another input."""
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.device.type == _habana.DEVICE_TYPE]
        if any(map(_habana.is_view, tensors)):
            return True
        addresses = [address for tensor in tensors if (address := tensor.data_ptr())]
        return len(set(addresses)) < len(addresses)

    def _key(self, args: Arguments) -> Key:
        hosted = self._number_of([args[i] for i in self._hosted]) if self._hosted else 0
        tensors = tuple(tensor_description(args[i]) for i in self._slots)
        return Key(tuple(args[i] for i in self._numbers), tensors, hosted)

    def _number_of(self, tensors: list[Tensor]) -> int:
        """The number of these values of the host inputs, which are constants of a captured graph."""
        for index, (number, known) in enumerate(self._host_values):
            if all(map(torch.equal, known, tensors)):
                self._host_values.insert(0, self._host_values.pop(index))
                return number
        self._host_number += 1
        self._host_values.insert(0, (self._host_number, [tensor.clone() for tensor in tensors]))
        del self._host_values[_MAX_HOST_VALUES:]
        return self._host_number

    # Replay

    def _replay(self, graph: Captured, args: Arguments) -> list[Tensor]:
        """The results of a replay, which are the caller's."""
        self._context.counts.replays += 1
        # A view would become a static input that later calls overwrite, with what it shows (bridge `hpu/graphs.py`).
        inputs = [arg.clone() if _habana.is_view(arg) else arg for arg in (args[slot] for slot in self._slots)]
        results: list[Tensor] = self._context.timed(Stage.REPLAY, self._run, graph, inputs, args)
        return results

    def _run(self, graph: Captured, inputs: list[Tensor], args: Arguments) -> list[Tensor]:
        carried = [args[slot] for slot in self._carried or ()]
        for copy, given in zip(graph.carried, carried, strict=True):
            copy.copy_(given)
        # The next replay overwrites the tensors that the graph returns.
        results = [result.clone() for result in graph.run(*inputs)]
        for copy, given in zip(graph.carried, carried, strict=True):
            given.copy_(copy)
        return results

    def _finish(self, args: Arguments, results: list[Tensor]) -> Any:
        return tuple(results) if self._rest is None else self._rest(*args, *results)

    def _run_plainly(self, args: Arguments, reason: str) -> Any:
        self._context.counts.plain(reason)
        return self._plain(*args)

    # Without a graph

    def _without_graph(self, found: WeightsGraphs, key: Key, args: Arguments) -> Any:
        """Run what has no graph for its key: in a larger one, captured, or plainly."""
        if self._store.dropped >= _MANY_REPLACEMENTS:
            return self._run_plainly(args, "its weights are given other memory again and again (`weight.data = x`)")
        candidate = found.candidate(key)
        if candidate.plain:
            return self._run_plainly(args, candidate.plain)
        candidate.seen += 1
        candidate.since = candidate.since or self._calls
        if self._padding is not None:
            verified = (other for other, graph in found.graphs.items() if not graph.to_verify)
            if (fit := self._padding.fit(candidate.padding, key, verified)) is not None:
                graph = found.use(fit.large, self._calls)
                run = self._padding.run
                results = run(candidate.padding, fit, args, lambda padded: self._replay(graph, padded), self._captured)
                return self._finish(args, list(results))
        reason = self._reason_to_wait(found, key, candidate) or self._make_room(found, candidate)
        return self._run_plainly(args, reason) if reason else self._capture(found, key, candidate, args)

    def _reason_to_wait(self, found: WeightsGraphs, key: Key, candidate: Candidate) -> str:
        """Why a key gets no graph when it comes first; empty if it gets one."""
        if candidate.seen > 1:
            return ""
        if self._store.holds_graphs and not found.graphs:
            return "the weights that it is called with are new"
        if self._hosted:
            self._count_new_value("is given tensors on the host that change from call to call, which no graph can read")
            return "the values of its inputs on the host are new"
        known = (*found.graphs, *found.candidates) if self._numbers else ()
        if any(other[1:] == key[1:] and other.numbers != key.numbers for other in known):
            self._count_new_value("uses a Python number that changes from call to call, such as `batch_idx`")
            return "it is given a Python number that changes, and this value is new"
        # One step may call this with many shapes, as a decoder with a growing cache does.
        return "its shapes are new" if self._captured_in == self._context.step else ""

    def _count_new_value(self, what: str) -> None:
        """Count the steps in a row in which a value was new; after many, the function is not traced any more."""
        if self._missed_in != self._context.step:
            self._misses = self._misses + 1 if self._missed_in == self._context.step - 1 else 1
            self._missed_in = self._context.step
        if self._misses >= _MANY_VALUES:
            self._context.stop_reason = f"it {what}"

    def _make_room(self, found: WeightsGraphs, candidate: Candidate) -> str:
        """Drop a graph if there are too many; why none may be dropped, if so."""
        config = self._context.config
        if candidate.evicted and config.graph_memory is not None:
            found.frozen = True
            self._context.warn(
                "memory",
                "The graphs of all shapes take more than `graph_memory`: those that were dropped are not captured"
                " again. Raise it, or let fewer shapes occur: `bucket_lengths`." + explained("more-shapes-than-graphs"),
            )
            return "its graph was dropped for `graph_memory`"
        if len(found.graphs) < config.max_graphs:
            return ""
        oldest = found.evictable(candidate, self._calls)
        if oldest is None:
            found.refused += 1
            if found.refused > config.max_graphs:
                self._context.warn(
                    "shapes",
                    f"There are more shapes in use than `max_graphs={config.max_graphs}`: the existing graphs are kept,"
                    " and batches of other shapes run plainly. Raise `max_graphs`, or let fewer shapes occur:"
                    " `bucket_lengths`." + explained("more-shapes-than-graphs"),
                )
            return "there are more shapes than `max_graphs`"
        self._evict(found, oldest)
        return ""

    def _evict(self, found: WeightsGraphs, key: Key) -> None:
        found.evict(key)
        self._context.counts.evictions += 1

    # Capture

    def _capture(self, found: WeightsGraphs, key: Key, candidate: Candidate, args: Arguments) -> Any:
        context, config = self._context, self._context.config
        self._captured_in = context.step
        before, memory = self._snapshot(args), context.memory_in_use()
        try:
            graph = self._graphed(args)
            # A capture matches its inputs by tensor: none may be another's alias, a weight's least of all.
            inputs = [args[slot].clone() for slot in self._slots]
            with context.capture():
                results = self._run(graph, inputs, args)
            graph.nbytes = max(0, context.memory_in_use() - memory)
        except Exception as error:
            candidate.plain = f"capturing failed ({in_words(error)})"
        else:
            if config.graph_memory is not None and graph.nbytes > config.graph_memory:
                candidate.plain = f"its graph takes {graph.nbytes} bytes, and `graph_memory` is {config.graph_memory}"
        if candidate.plain:
            before.restore()
            context.warn_of_plain_part(f"{candidate.plain}{self._where}")
            return self._run_plainly(args, candidate.plain)
        context.counts.captures += 1
        graph.to_verify = config.verify_graphs + 1 if config.verify_graphs else 0
        self._store.add(found, self._statics(args), key, graph, self._calls)
        self._keep_within_memory(found)
        return self._compared(found, key, args, results, before) if graph.to_verify else self._finish(args, results)

    def _carry(self, args: Arguments) -> None:
        """Find what is written and is not a buffer of the model: it may be another tensor in each call."""
        buffers = self._context.registered()
        registered = {slot for slot in self._static_slots if id(args[slot]) in buffers}
        self._carried = [slot for slot in self._written if slot not in registered]
        self._slots = [slot for slot in self._slots if slot not in self._carried]
        self._statics = _getter([slot for slot in self._static_slots if slot not in self._carried])

    def _graphed(self, args: Arguments) -> Captured:
        """The captured part as a function of the tensors that change from call to call."""
        forward, slots = self._captured, self._slots
        fixed = list(args)
        for slot in slots:
            fixed[slot] = None  # the closure must not keep the first batch
        carried = [args[slot].clone() for slot in self._carried or ()]
        for slot, copy in zip(self._carried or (), carried, strict=True):
            fixed[slot] = copy

        def function(*tensors: Tensor) -> list[Tensor]:
            given = fixed.copy()
            for slot, tensor in zip(slots, tensors, strict=True):
                given[slot] = tensor
            return list(forward(*given))

        return Captured(_habana.graphed(function), carried)

    def _keep_within_memory(self, found: WeightsGraphs) -> None:
        budget = self._context.config.graph_memory
        if budget is not None:
            while sum(graph.nbytes for graph in found.graphs.values()) > budget and len(found.graphs) > 1:
                self._evict(found, next(iter(found.graphs)))

    # Verification

    def _snapshot(self, args: Arguments) -> Snapshot:
        return Snapshot(args[slot] for slot in self._written)

    def _verified(self, found: WeightsGraphs, key: Key, args: Arguments) -> Any:
        """Replay a graph and compare it with the plain ops."""
        before = self._snapshot(args)
        return self._compared(found, key, args, self._replay(found.graphs[key], args), before)

    def _compared(
        self, found: WeightsGraphs, key: Key, args: Arguments, results: list[Tensor], before: Snapshot
    ) -> Any:
        """Compare a replay with the plain ops, whose results the caller gets; drop the graph if they differ."""
        expected, differs = before.compare(results, lambda: list(self._captured(*args)))
        found.graphs[key].to_verify -= 1
        self._context.counts.verified += 1
        if differs:
            del found.graphs[key]
            candidate = found.candidate(key)
            candidate.plain = f"a replay differs from the plain ops ({differs})"
            self._context.warn_of_plain_part(f"{candidate.plain}{self._where}")
        return self._finish(args, expected)


def _getter(slots: list[int]) -> Callable[[Arguments], tuple[Any, ...]]:
    """Like `itemgetter`, whose result is a tuple for any number of slots."""
    if len(slots) > 1:
        return itemgetter(*slots)
    return lambda args: tuple(args[slot] for slot in slots)
