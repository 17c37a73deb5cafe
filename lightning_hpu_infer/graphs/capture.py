"""One FX graph as HPU graphs: captured once per shape and set of weights, verified, replayed, bounded."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from lightning_hpu_infer import _habana, _torch
from lightning_hpu_infer.graphs.compare import difference
from lightning_hpu_infer.graphs.context import GraphContext
from lightning_hpu_infer.graphs.padding import BatchDimension
from lightning_hpu_infer.graphs.split import Split
from lightning_hpu_infer.trace import Stage

Arguments = tuple[Any, ...]
Key = tuple[Any, ...]

# Shapes of one FX graph that are remembered, captured or not.
_MAX_KEYS = 1024
# Steps in a row with a Python number, or values on the host, that are new, after which these are taken for data.
_MANY_NUMBERS = 4
# Sets of values of host inputs that are remembered.
_MAX_HOST_VALUES = 4


class _Unfit(Exception):
    """Raised when a capture cannot be used; its message says why."""


@dataclass
class _Entry:
    """One captured graph."""

    run: Callable[..., list[Tensor]]
    """Takes the tensors that change from call to call; its results are overwritten by the next call."""
    to_verify: int
    carried: list[Tensor]
    """Its own memory in place of inputs that it writes to and that are no buffers of the model."""
    nbytes: int = 0
    """Device memory that the capture took, roughly."""
    used: int = 0
    """The call that used it last."""


@dataclass
class _Candidate:
    """A shape without a graph."""

    seen: int = 0
    since: int = 0
    """The call that `seen` counts from."""
    evicted: bool = False
    plain: str = ""
    """Why it will never have a graph."""
    may_pad: bool = True


@dataclass(eq=False)
class _Weights:
    """The tensors that a number of graphs were captured with: they read this memory, whatever the module holds."""

    tensors: tuple[Any, ...]
    """Those tensors; their `id`s while there is no graph, so that nothing is kept alive."""
    replacements: int
    """How many replacements of tensor data were looked at."""
    entries: OrderedDict[Key, _Entry] = field(default_factory=OrderedDict)
    """Least recently used first."""
    candidates: OrderedDict[Key, _Candidate] = field(default_factory=OrderedDict)
    used: int = 0
    frozen: bool = False
    """Whether no graph may take another one's place any more."""

    def candidate(self, key: Key) -> _Candidate:
        """What is known of a shape without a graph."""
        found = self.candidates.setdefault(key, _Candidate())
        self.candidates.move_to_end(key)
        if len(self.candidates) > _MAX_KEYS:
            self.candidates.popitem(last=False)
        return found


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
        line = _torch.users_line(module)
        self._where = f", at {line}" if line else ""
        self._context = context
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        values = [_torch.fake_value(node) for node in nodes]
        used = {node.name for node in parts.captured.graph.nodes if node.op == "placeholder" and node.users}
        self._arity = len(nodes)
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
        self._weights: list[_Weights] = []
        """Those with graphs."""
        self._new_weights: dict[tuple[int, ...], _Weights] = {}
        """Those without, by the `id`s of their tensors."""
        self._calls = 0
        self._captured_in = -1
        self._misses, self._missed_in = 0, -1
        may_pad = context.config.pad_batch and not parts.written
        self._batch = BatchDimension.of(parts.results, values, self._places, self._numbers) if may_pad else None
        context.register(self)

    def __call__(self, *args: Any) -> Any:
        """Replay the graph for these inputs, or run it plainly where it has no graph for them."""
        if self._context.capturing or torch.is_grad_enabled():
            return self._plain(*args)
        self._calls += 1
        if self._carried is None:
            self._carry(args)
        weights, key = self._weights_of(args), self._key(args)
        entry = weights.entries.get(key)
        if entry is not None and not entry.to_verify:
            weights.entries.move_to_end(key)
            entry.used = self._calls
            return self._finish(args, self._replay(entry, args))
        return self._context.timed(Stage.CAPTURE, self._new, weights, key, entry, args)

    def release(self) -> None:
        """Free all graphs, of which none may be running."""
        self._weights.clear()

    def rebind(self, now: dict[int, Tensor | None]) -> None:
        """Take other tensor objects for those that the graphs were captured with, in another run.

        Args:
            now: Per former tensor, by `id`, the one that shows its memory; None if no tensor does.
        """
        for weights in list(self._weights):
            tensors = tuple(now.get(id(tensor), tensor) for tensor in weights.tensors)
            if any(tensor is None for tensor in tensors):
                self._drop(weights)
            weights.tensors, weights.replacements = tensors, self._context.replacements.count

    @property
    def holds_graphs(self) -> bool:
        """Whether there is anything to keep for another run."""
        return any(weights.entries for weights in self._weights)

    # Identity

    def _weights_of(self, args: Arguments) -> _Weights:
        """The graphs that were captured with these very tensors."""
        statics, replacements = self._statics(args), self._context.replacements
        for weights in self._weights:
            if all(map(is_, weights.tensors, statics)):
                if weights.replacements != replacements.count:
                    if replacements.any_since(weights.replacements, weights.tensors):
                        self._drop(weights)
                        break
                    weights.replacements = replacements.count
                weights.used = self._calls
                return weights
        ids = tuple(map(id, statics))
        if (known := self._new_weights.get(ids)) is not None:
            known.used = self._calls
            return known
        made = self._new_weights[ids] = _Weights(ids, replacements.count, used=self._calls)
        if len(self._new_weights) > _MAX_KEYS:
            del self._new_weights[next(iter(self._new_weights))]
        return made

    def _keep(self, weights: _Weights, args: Arguments) -> None:
        """Hold the tensors of weights that are about to have their first graph."""
        if not any(each is weights for each in self._weights):
            self._new_weights.pop(weights.tensors, None)
            weights.tensors, weights.replacements = self._statics(args), self._context.replacements.count
            # Some are gone for good, a few may come back: an adapter, say. Blocks that share this graph are all in use.
            limit = 16 + 4 * len(self._weights)
            for unused in [each for each in self._weights if self._calls - each.used > limit]:
                self._drop(unused)
            self._weights.append(weights)

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

    def _drop(self, weights: _Weights) -> None:
        if weights.entries:
            _habana.synchronize()  # The last replay may still be running.
        weights.entries.clear()
        self._weights.remove(weights)

    # Replay

    def _inputs(self, args: Arguments) -> list[Tensor]:
        # A view would become a static input that later calls overwrite, with what it shows (bridge `hpu/graphs.py`).
        return [arg.clone() if _habana.is_view(arg) else arg for arg in (args[i] for i in self._places)]

    def _replay(self, entry: _Entry, args: Arguments) -> list[Tensor]:
        """The results of a replay, which are the caller's."""
        self._context.counts.replays += 1
        results: list[Tensor] = self._context.timed(Stage.REPLAY, self._run, entry, self._inputs(args), args)
        return results

    def _run(self, entry: _Entry, inputs: list[Tensor], args: Arguments) -> list[Tensor]:
        carried = [args[place] for place in self._carried or ()]
        for own, given in zip(entry.carried, carried, strict=True):
            own.copy_(given)
        # The next replay overwrites the graph's own tensors.
        results = [result.clone() for result in entry.run(*inputs)]
        for own, given in zip(entry.carried, carried, strict=True):
            given.copy_(own)
        return results

    def _finish(self, args: Arguments, results: list[Tensor]) -> Any:
        return tuple(results) if self._rest is None else self._rest(*args, *results)

    def _run_plainly(self, args: Arguments, reason: str) -> Any:
        self._context.counts.plain(reason)
        return self._plain(*args)

    # New shapes

    def _new(self, weights: _Weights, key: Key, entry: _Entry | None, args: Arguments) -> Any:
        if entry is not None:
            return self._verified_replay(weights, key, entry, args)
        candidate = weights.candidate(key)
        if candidate.plain:
            return self._run_plainly(args, candidate.plain)
        candidate.seen += 1
        candidate.since = candidate.since or self._calls
        if self._batch is not None and candidate.may_pad:
            verified = (other for other, graph in weights.entries.items() if not graph.to_verify)
            if (large := self._batch.smallest(key, verified)) is not None:
                return self._padded(weights, key, large, args)
        if (reason := self._not_yet(weights, key, candidate)) or (reason := self._make_room(weights, candidate)):
            return self._run_plainly(args, reason)
        return self._capture(weights, key, candidate, args)

    def _not_yet(self, weights: _Weights, key: Key, candidate: _Candidate) -> str:
        """Why a shape gets no graph this time."""
        if candidate.seen == 1 and self._weights and not weights.entries:
            return "the weights that it is called with are new"
        if self._hosted and candidate.seen == 1:
            if self._many_misses():
                self._context.too_many_host_values()
            return "the values of its inputs on the host are new"
        if self._differs_in_numbers_only(weights, key):
            if candidate.seen == 1:
                if self._many_misses():
                    self._context.too_many_numbers()
                return "it is given a Python number that changes, and this value is new"
        elif self._captured_in == self._context.step and candidate.seen == 1:
            # One step calls this graph with many shapes, as a decoder with a growing cache does.
            return "its shapes are new"
        return ""

    def _many_misses(self) -> bool:
        """Count a step in which a value was new, and say whether there were many in a row."""
        if self._missed_in != self._context.step:
            self._misses = self._misses + 1 if self._missed_in == self._context.step - 1 else 1
            self._missed_in = self._context.step
        return self._misses >= _MANY_NUMBERS

    def _differs_in_numbers_only(self, weights: _Weights, key: Key) -> bool:
        if not self._keyed or not self._numbers:
            return False
        known = (*weights.entries, *weights.candidates)
        return any(other[1:] == key[1:] and other[0] != key[0] for other in known)

    def _make_room(self, weights: _Weights, candidate: _Candidate) -> str:
        """Drop the least recently used graph if there are too many; why it may not be dropped, if it may not.

        It goes only if the new shape came twice since it was used: more shapes in turn than there may be graphs would
        replace each other without end. What was dropped and comes back shows the same.
        """
        limit = self._context.config.max_graphs
        weights.frozen |= candidate.evicted
        if len(weights.entries) < limit:
            return ""
        oldest = next(iter(weights.entries))
        if weights.entries[oldest].used >= candidate.since:
            candidate.seen, candidate.since = 1, self._calls
        if weights.frozen or candidate.seen < 2:
            if candidate.seen > 1 or weights.frozen:
                self._context.warn(
                    "more shapes",
                    f"There are more shapes in use than `max_graphs={limit}`: the graphs that there are stay, and"
                    " batches of other shapes run plainly. Raise `max_graphs`, or let fewer shapes occur:"
                    " `bucket_lengths`.",
                )
            return "there are more shapes than `max_graphs`"
        self._evict(weights, oldest)
        return ""

    def _evict(self, weights: _Weights, key: Key) -> None:
        _habana.synchronize()  # Its last replay may still be running.
        del weights.entries[key]
        weights.candidate(key).evicted = True
        self._context.counts.evictions += 1

    # Capture and verification

    def _capture(self, weights: _Weights, key: Key, candidate: _Candidate, args: Arguments) -> Any:
        context, verify = self._context, self._context.config.verify_graphs
        self._captured_in = context.step
        before, memory = self._written_tensors(args), context.memory_in_use()
        saved = [tensor.clone() for tensor in before]
        try:
            entry = self._graphed(args)
            entry.to_verify = verify + 1 if verify else 0
            # A capture matches its inputs by tensor: none may be another's alias, a weight's least of all.
            inputs = [args[i].clone() for i in self._places]
            with context.capture():
                results = self._run(entry, inputs, args)
            entry.nbytes = max(0, context.memory_in_use() - memory)
            budget = context.config.graph_memory
            if budget is not None and entry.nbytes > budget:
                raise _Unfit(f"its graph alone takes {entry.nbytes} bytes, and `graph_memory` is {budget}")
        except Exception as error:
            for tensor, value in zip(before, saved, strict=True):
                tensor.copy_(value)
            candidate.plain = str(error) if isinstance(error, _Unfit) else _in_words(error)
            context.fails(f"{candidate.plain}{self._where}")
            return self._run_plainly(args, candidate.plain)
        context.counts.captures += 1
        self._keep(weights, args)
        weights.entries[key] = entry
        weights.candidates.pop(key, None)
        self._hold_budget(weights)
        entry.used = self._calls
        return self._check(weights, key, entry, args, results, saved)

    def _carry(self, args: Arguments) -> None:
        """Find what is written and not the model's own: it may be another tensor in each call."""
        buffers = self._context.registered()
        self._carried = [place for place in self._parts.written if id(args[place]) not in buffers]
        self._static_places = [place for place in self._static_places if place not in self._carried]
        self._places = [place for place in self._places if place not in self._carried]
        self._statics = _getter(self._static_places)

    def _graphed(self, args: Arguments) -> _Entry:
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

        return _Entry(_habana.graphed(function), 0, carried)

    def _written_tensors(self, args: Arguments) -> list[Tensor]:
        return [args[place] for place in self._parts.written]

    def _verified_replay(self, weights: _Weights, key: Key, entry: _Entry, args: Arguments) -> Any:
        saved = [tensor.clone() for tensor in self._written_tensors(args)]
        entry.used = self._calls
        weights.entries.move_to_end(key)
        return self._check(weights, key, entry, args, self._replay(entry, args), saved)

    def _check(
        self,
        weights: _Weights,
        key: Key,
        entry: _Entry,
        args: Arguments,
        results: list[Tensor],
        saved: list[Tensor],
    ) -> Any:
        """Compare a replay with the plain ops, if there is something to verify; the caller gets the plain results.

        `results` are those of the replay; `saved` is what the memory that it writes to held before.
        """
        if not entry.to_verify:
            return self._finish(args, results)
        written = self._written_tensors(args)
        after = [tensor.clone() for tensor in written]
        for tensor, value in zip(written, saved, strict=True):
            tensor.copy_(value)
        expected = list(self._captured(*args))
        entry.to_verify -= 1
        self._context.counts.verified += 1
        if found := difference([*results, *after], [*expected, *written]):
            reason = f"a replay differs from the plain ops ({found})"
            del weights.entries[key]
            weights.candidate(key).plain = reason
            self._context.fails(f"{reason}{self._where}")
        return self._finish(args, expected)

    def _hold_budget(self, weights: _Weights) -> None:
        budget = self._context.config.graph_memory
        if budget is not None:
            while sum(entry.nbytes for entry in weights.entries.values()) > budget and len(weights.entries) > 1:
                self._evict(weights, next(iter(weights.entries)))

    # Short batches

    def _padded(self, weights: _Weights, key: Key, large: Key, args: Arguments) -> Any:
        """Run a short batch in a larger graph, compared with the plain ops the first time."""
        assert self._batch is not None
        entry, candidate = weights.entries[large], weights.candidate(key)
        weights.entries.move_to_end(large)
        entry.used = self._calls
        padded = self._batch.pad(args, self._batch.rows_of(large))
        results = self._batch.cut(self._replay(entry, padded), self._batch.rows_of(key))
        self._context.counts.padded += 1
        if candidate.seen == 1 and not self._parts.random:
            expected = list(self._captured(*args))
            self._context.counts.verified += 1
            if found := difference(results, expected):
                candidate.may_pad = False
                self._context.cannot_pad(found)
            results = expected
        return self._finish(args, results)


def _getter(places: list[int]) -> Callable[[Arguments], tuple[Any, ...]]:
    """Like `itemgetter`, whose result is a tuple for any number of places."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda args: tuple(args[place] for place in places)


def _in_words(error: Exception) -> str:
    message = " ".join(str(error).split("\n\n")[0].split())
    return f"capturing failed ({type(error).__name__}: {message})"
