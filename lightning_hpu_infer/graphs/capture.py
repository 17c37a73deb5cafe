"""One FX graph as HPU graphs: captured once per shape and set of weights, verified, replayed, bounded."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from lightning_hpu_infer import _habana, _torch
from lightning_hpu_infer.graphs.compare import difference
from lightning_hpu_infer.graphs.context import GraphContext
from lightning_hpu_infer.graphs.padding import Fit, Padding
from lightning_hpu_infer.graphs.split import Split
from lightning_hpu_infer.graphs.store import Candidate, Captured, GraphStore, Key, WeightsGraphs
from lightning_hpu_infer.observe.spans import Stage

Arguments = tuple[Any, ...]

# Steps in a row with a Python number, or values on the host, that are new, after which these are taken for data.
_MANY_NUMBERS = 4
# Times that weights are given other memory, after which nothing is captured any more.
_MANY_REPLACEMENTS = 3
# Sets of values of host inputs that are remembered.
_MAX_HOST_VALUES = 4


class _Unfit(Exception):
    """Raised when a capture cannot be used; its message says why."""


class CapturedGraph:
    """What Dynamo calls in place of one FX graph, in lazy mode.

    Weights and buffers are closed over and compared by identity in each call; the other inputs are given to each
    replay. Of those that the graph writes to, such as a cache of keys and values, it has a copy that is filled before a
    replay and copied back after it. Main thread only. The results are the caller's: nothing overwrites them.

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
        self._parts = parts
        self._where = _torch.users_line(module.graph.nodes)
        self._context = context
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        values = [_torch.fake_value(node) for node in nodes]
        used = {node.name for node in parts.captured.graph.nodes if node.op == "placeholder" and node.users}
        tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor) and nodes[i].name in used]
        self._static_places = [i for i in tensors if _torch.is_static(nodes[i])]
        self._carried: list[int] | None = None
        """Places of the inputs that are written and are no buffers; found at the first capture."""
        self._hosted = list(parts.hosted)
        self._host_values: list[tuple[int, list[Tensor]]] = []
        """Values of the host inputs, each with a number, newest first."""
        self._host_number = 0
        self._places = [i for i in tensors if i not in self._static_places and i not in parts.hosted]
        self._numbers = [i for i, value in enumerate(values) if not isinstance(value, Tensor) and nodes[i].name in used]
        symbolic = any(type(size) is str for i in tensors for size in _torch.sizes_of(values[i]))
        self._keyed = symbolic or bool(self._numbers) or bool(self._hosted)
        self._statics = _getter(self._static_places)
        self._store = GraphStore(context.replacements)
        self._calls = 0
        self._captured_in = -1
        self._misses, self._missed_in = 0, -1
        may_pad = context.config.pad_batch and not parts.written
        self._padding: Padding | None = None
        if may_pad:
            self._padding = Padding(parts.results, values, self._places, self._numbers)
        context.register(self)

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
            return self._context.timed(Stage.CAPTURE, self._without, found, key, args)
        found.use(key, self._calls)
        if graph.to_verify:
            return self._context.timed(Stage.CAPTURE, self._verified, found, key, args)
        return self._finish(args, self._replay(graph, args))

    def release(self) -> None:
        """Free all graphs."""
        self._store.clear()

    def rebind(self, now: dict[int, Tensor | None]) -> None:
        """Begin another run, in which other tensor objects may show the weights' memory: see `GraphStore.rebind`."""
        self._store.rebind(now)

    @property
    def holds_graphs(self) -> bool:
        """Whether there is anything to keep for another run."""
        return bool(self._store)

    # Identity

    def _share_memory(self, args: Arguments) -> bool:
        """Whether a copy of what is written may hide the write from another input."""
        tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.device.type == _habana.DEVICE_TYPE]
        if any(map(_habana.is_view, tensors)):
            return True
        addresses = [address for tensor in tensors if (address := tensor.data_ptr())]
        return len(set(addresses)) < len(addresses)

    def _key(self, args: Arguments) -> Key:
        if not self._keyed:
            return ()
        numbers = tuple(args[i] for i in self._numbers)
        hosted = self._number_of([args[i] for i in self._hosted]) if self._hosted else 0
        return numbers, tuple(_torch.tensor_description(args[i]) for i in self._places), hosted

    def _number_of(self, tensors: list[Tensor]) -> int:
        """The number of these values of the host inputs, which a graph keeps as they are when it is captured."""
        for place, (number, known) in enumerate(self._host_values):
            if all(map(torch.equal, known, tensors)):
                self._host_values.insert(0, self._host_values.pop(place))
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
        inputs = [arg.clone() if _habana.is_view(arg) else arg for arg in (args[place] for place in self._places)]
        results: list[Tensor] = self._context.timed(Stage.REPLAY, self._run, graph, inputs, args)
        return results

    def _run(self, graph: Captured, inputs: list[Tensor], args: Arguments) -> list[Tensor]:
        carried = [args[place] for place in self._carried or ()]
        for own, given in zip(graph.carried, carried, strict=True):
            own.copy_(given)
        # The next replay overwrites the graph's own tensors.
        results = [result.clone() for result in graph.run(*inputs)]
        for own, given in zip(graph.carried, carried, strict=True):
            given.copy_(own)
        return results

    def _finish(self, args: Arguments, results: list[Tensor]) -> Any:
        return tuple(results) if self._rest is None else self._rest(*args, *results)

    def _run_plainly(self, args: Arguments, reason: str) -> Any:
        self._context.counts.plain(reason)
        return self._plain(*args)

    # Without a graph

    def _without(self, found: WeightsGraphs, key: Key, args: Arguments) -> Any:
        """Run what has no graph for its shape: in a larger one, captured, or plainly."""
        if self._store.dropped >= _MANY_REPLACEMENTS:
            return self._run_plainly(args, "its weights are given other memory again and again (`weight.data = x`)")
        candidate = found.candidate(key)
        if candidate.plain:
            return self._run_plainly(args, candidate.plain)
        candidate.seen += 1
        candidate.since = candidate.since or self._calls
        if self._padding is not None and candidate.may_pad:
            fit = self._padding.fit(key, (other for other, graph in found.graphs.items() if not graph.to_verify))
            if fit is not None and (reason := self._padding.unfit(fit)):
                candidate.may_pad = False
                self._context.cannot_pad(reason)
            elif fit is not None:
                return self._padded(self._padding, fit, found, candidate, args)
        reason = self._reason_to_wait(found, key, candidate) or self._make_room(found, candidate)
        return self._run_plainly(args, reason) if reason else self._capture(found, key, candidate, args)

    def _reason_to_wait(self, found: WeightsGraphs, key: Key, candidate: Candidate) -> str:
        """Why a shape gets no graph when it comes first."""
        if candidate.seen > 1:
            return ""
        if self._store and not found.graphs:
            return "the weights that it is called with are new"
        if self._hosted:
            if self._is_data():
                self._context.too_many_host_values()
            return "the values of its inputs on the host are new"
        known = (*found.graphs, *found.candidates) if self._numbers else ()
        if any(other[1:] == key[1:] and other[0] != key[0] for other in known):
            if self._is_data():
                self._context.too_many_numbers()
            return "it is given a Python number that changes, and this value is new"
        # One step may call this with many shapes, as a decoder with a growing cache does.
        return "its shapes are new" if self._captured_in == self._context.step else ""

    def _is_data(self) -> bool:
        """Count a step in which a value was new, and say whether there were many in a row."""
        if self._missed_in != self._context.step:
            self._misses = self._misses + 1 if self._missed_in == self._context.step - 1 else 1
            self._missed_in = self._context.step
        return self._misses >= _MANY_NUMBERS

    def _make_room(self, found: WeightsGraphs, candidate: Candidate) -> str:
        """Drop a graph if there are too many; why none may be dropped, if so."""
        limit = self._context.config.max_graphs
        if candidate.evicted and self._context.config.graph_memory is not None:
            found.frozen = True
            self._context.too_little_memory()
            return "its graph was dropped for `graph_memory`"
        if len(found.graphs) < limit:
            return ""
        oldest = found.evictable(candidate, self._calls)
        if oldest is None:
            found.refused += 1
            if found.refused > limit:
                self._context.too_many_shapes(limit)
            return "there are more shapes than `max_graphs`"
        self._evict(found, oldest)
        return ""

    def _evict(self, found: WeightsGraphs, key: Key) -> None:
        found.evict(key)
        self._context.counts.evictions += 1

    def _padded(self, padding: Padding, fit: Fit, found: WeightsGraphs, candidate: Candidate, args: Arguments) -> Any:
        """Run a short batch in a larger graph, compared with the plain ops the first time."""
        graph = found.use(fit.large, self._calls)
        results = padding.cut(self._replay(graph, padding.pad(args, fit)), fit)
        self._context.counts.padded += 1
        if not candidate.padded:
            candidate.padded = True
            expected = list(self._captured(*args))
            self._context.counts.verified += 1
            if differs := difference(results, expected):
                candidate.may_pad = False
                self._context.cannot_pad(f"rows added to a short batch change the others: {differs}")
            results = expected
        return self._finish(args, results)

    # Capture

    def _capture(self, found: WeightsGraphs, key: Key, candidate: Candidate, args: Arguments) -> Any:
        context, config = self._context, self._context.config
        self._captured_in = context.step
        saved, memory = self._copies_of_written(args), context.memory_in_use()
        try:
            graph = self._graphed(args)
            # A capture matches its inputs by tensor: none may be another's alias, a weight's least of all.
            inputs = [args[place].clone() for place in self._places]
            with context.capture():
                results = self._run(graph, inputs, args)
            graph.nbytes = max(0, context.memory_in_use() - memory)
            if config.graph_memory is not None and graph.nbytes > config.graph_memory:
                raise _Unfit(f"its graph takes {graph.nbytes} bytes, and `graph_memory` is {config.graph_memory}")
        except Exception as error:
            self._write_back(args, saved)
            candidate.plain = str(error) if isinstance(error, _Unfit) else _in_words(error)
            context.fails(f"{candidate.plain}{self._where}")
            return self._run_plainly(args, candidate.plain)
        context.counts.captures += 1
        graph.to_verify = config.verify_graphs + 1 if config.verify_graphs else 0
        self._store.add(found, self._statics(args), key, graph, self._calls)
        self._hold_budget(found)
        return self._compared(found, key, args, results, saved) if graph.to_verify else self._finish(args, results)

    def _carry(self, args: Arguments) -> None:
        """Find what is written and not the model's own: it may be another tensor in each call."""
        buffers = self._context.registered()
        own = {place for place in self._static_places if id(args[place]) in buffers}
        self._carried = [place for place in self._parts.written if place not in own]
        self._places = [place for place in self._places if place not in self._carried]
        self._statics = _getter([place for place in self._static_places if place not in self._carried])

    def _graphed(self, args: Arguments) -> Captured:
        """The captured part as a function of the tensors that change from call to call."""
        forward, places = self._captured, self._places
        fixed = list(args)
        for place in places:
            fixed[place] = None  # only the first batch, which would take device memory
        carried = [args[place].clone() for place in self._carried or ()]
        for place, own in zip(self._carried or (), carried, strict=True):
            fixed[place] = own

        def function(*tensors: Tensor) -> list[Tensor]:
            given = fixed.copy()
            for place, tensor in zip(places, tensors, strict=True):
                given[place] = tensor
            return list(forward(*given))

        return Captured(_habana.graphed(function), carried)

    def _hold_budget(self, found: WeightsGraphs) -> None:
        budget = self._context.config.graph_memory
        if budget is not None:
            while sum(graph.nbytes for graph in found.graphs.values()) > budget and len(found.graphs) > 1:
                self._evict(found, next(iter(found.graphs)))

    # Verification

    def _verified(self, found: WeightsGraphs, key: Key, args: Arguments) -> Any:
        """Replay a graph and compare it with the plain ops."""
        saved = self._copies_of_written(args)
        return self._compared(found, key, args, self._replay(found.graphs[key], args), saved)

    def _compared(
        self, found: WeightsGraphs, key: Key, args: Arguments, results: list[Tensor], saved: list[Tensor]
    ) -> Any:
        """Compare a replay, and the memory that it wrote to, with the plain ops; the caller gets the plain results.

        `results` are those of the replay; `saved` is what that memory held before.
        """
        after = self._copies_of_written(args)
        self._write_back(args, saved)
        expected = list(self._captured(*args))
        found.graphs[key].to_verify -= 1
        self._context.counts.verified += 1
        written = [args[place] for place in self._parts.written]
        if differs := difference([*results, *after], [*expected, *written]):
            del found.graphs[key]
            candidate = found.candidate(key)
            candidate.plain = f"a replay differs from the plain ops ({differs})"
            self._context.fails(f"{candidate.plain}{self._where}")
        return self._finish(args, expected)

    def _copies_of_written(self, args: Arguments) -> list[Tensor]:
        return [args[place].clone() for place in self._parts.written]

    def _write_back(self, args: Arguments, values: list[Tensor]) -> None:
        for place, value in zip(self._parts.written, values, strict=True):
            args[place].copy_(value)


def _getter(places: list[int]) -> Callable[[Arguments], tuple[Any, ...]]:
    """Like `itemgetter`, whose result is a tuple for any number of places."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: tuple(args[place] for place in places)


def _in_words(error: Exception) -> str:
    message = " ".join(str(error).split("\n\n")[0].split())
    return f"capturing failed ({type(error).__name__}: {message})"
