"""The captured graphs of one FX graph: found by weights and cache key, bounded, dropped when unused."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor

from lightning_hpu_infer import _habana
from lightning_hpu_infer.graphs.replacements import DataReplacements

# Keys, and sets of weights, that are remembered without a graph.
_MAX_KNOWN = 1024


def tensor_description(tensor: Tensor) -> tuple[Any, ...]:
    """What a captured program depends on: shape, strides and dtype."""
    return tensor.shape, tensor.stride(), tensor.dtype


class Key(NamedTuple):
    """What distinguishes calls of one traced graph, besides the weights."""

    numbers: tuple[Any, ...] = ()
    """The Python numbers among its inputs."""
    tensors: tuple[tuple[Any, ...], ...] = ()
    """Shape, strides and dtype of each tensor that changes from call to call: `tensor_description`."""
    host_values: int = 0
    """Which set of values the host tensors among its inputs have; 0 if there are none."""


@dataclass
class PadState:
    """What is known of one shape's use of larger graphs."""

    allowed: bool = True
    verified: bool = False


@dataclass
class Captured:
    """One captured graph."""

    run: Callable[..., list[Tensor]]
    """Takes the tensors that change from call to call. The next call overwrites its results."""
    carried: list[Tensor]
    """The graph's copies of inputs that it writes to and that are not buffers of the model."""
    to_verify: int = 0
    """Calls that are still to be compared with the plain ops."""
    nbytes: int = 0
    """Device memory that the capture took, in bytes, roughly."""
    used: int = 0
    """Number of the call that used it last."""


@dataclass
class Candidate:
    """A key without a graph."""

    seen: int = 0
    since: int = 0
    """Number of the call that `seen` counts from."""
    evicted: bool = False
    """Whether it had a graph, which was dropped for another one."""
    plain: str = ""
    """Why it will never have a graph; empty if it may."""
    padding: PadState = field(default_factory=PadState)


@dataclass(eq=False)
class WeightsGraphs:
    """Graphs that were captured with the same weights: they read this memory, whatever weights the model has now."""

    tensors: tuple[Any, ...]
    """The weights; their `id`s while there is no graph, so that nothing is kept alive."""
    replacements: int
    """The value of `DataReplacements.count` when they were last checked."""
    used: int
    """Number of the call that found them last."""
    graphs: OrderedDict[Key, Captured] = field(default_factory=OrderedDict)
    """Least recently used first."""
    candidates: OrderedDict[Key, Candidate] = field(default_factory=OrderedDict)
    frozen: bool = False
    """Whether graphs are no longer dropped for others."""
    refused: int = 0
    """How often there was no room for a graph."""

    def candidate(self, key: Key) -> Candidate:
        """What is known of a key without a graph."""
        found = self.candidates.setdefault(key, Candidate())
        self.candidates.move_to_end(key)
        if len(self.candidates) > _MAX_KNOWN:
            self.candidates.popitem(last=False)
        return found

    def use(self, key: Key, call: int) -> Captured:
        """Mark a graph as the most recently used one."""
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        graph.used = call
        return graph

    def evictable(self, candidate: Candidate, call: int) -> Key | None:
        """The least recently used graph, if it may be dropped for a new key; None otherwise.

        It may if the key came twice since that graph was used: more keys in turn than `max_graphs` would replace each
        other without end. So would a key that comes back after its graph was dropped.
        """
        self.frozen |= candidate.evicted
        oldest = next(iter(self.graphs))
        if self.graphs[oldest].used >= candidate.since:
            candidate.seen, candidate.since = 1, call
        return None if self.frozen or candidate.seen < 2 else oldest

    def evict(self, key: Key) -> None:
        """Drop a graph for another one."""
        _habana.synchronize()  # Its last replay may still be running.
        del self.graphs[key]
        self.candidate(key).evicted = True


class GraphStore:
    """All captured graphs of one FX graph, by the weights that they were captured with. Main thread only.

    Args:
        replacements: Records which tensors were given other memory.
    """

    def __init__(self, replacements: DataReplacements) -> None:
        self._replacements = replacements
        self._captured: list[WeightsGraphs] = []
        self._known: dict[tuple[int, ...], WeightsGraphs] = {}
        """Those without a graph, by the `id`s of their weights."""
        self.dropped = 0
        """How often graphs were dropped because a weight was given other memory."""

    @property
    def holds_graphs(self) -> bool:
        """Whether any graph is captured."""
        return any(each.graphs for each in self._captured)

    def find(self, tensors: tuple[Any, ...], call: int) -> WeightsGraphs:
        """The graphs that were captured with these tensor objects; an entry without graphs if there are none."""
        for each in self._captured:
            if all(map(is_, each.tensors, tensors)):
                if each.replacements != self._replacements.count:
                    if self._replacements.any_since(each.replacements, each.tensors):
                        self._drop(each)
                        self.dropped += 1
                        break
                    each.replacements = self._replacements.count
                each.used = call
                return each
        ids = tuple(map(id, tensors))
        if (known := self._known.get(ids)) is None:
            known = self._known[ids] = WeightsGraphs(ids, self._replacements.count, call)
            if len(self._known) > _MAX_KNOWN:
                del self._known[next(iter(self._known))]
        return known

    def add(self, found: WeightsGraphs, tensors: tuple[Any, ...], key: Key, graph: Captured, call: int) -> None:
        """Keep a graph, and with the first one of `found` a reference to its weights."""
        if not any(each is found for each in self._captured):
            self._known.pop(found.tensors, None)
            found.tensors, found.replacements, found.used = tensors, self._replacements.count, call
            # Weights that were replaced never come back, those of an adapter may. All blocks that share this FX graph
            # are in use.
            limit = 16 + 4 * len(self._captured)
            for unused in [each for each in self._captured if call - each.used > limit]:
                self._drop(unused)
            self._captured.append(found)
        found.graphs[key] = graph
        found.candidates.pop(key, None)
        graph.used = call

    def rebind(self, now: dict[int, Tensor | None]) -> None:
        """Begin another run, in which other tensor objects may have the weights' memory.

        Args:
            now: Per former tensor, by `id`, the one that has its memory now. Graphs of a tensor with None are dropped.
        """
        self._known.clear()
        for each in list(self._captured):
            tensors = tuple(now.get(id(tensor), tensor) for tensor in each.tensors)
            if any(tensor is None for tensor in tensors):
                self._drop(each)
            each.tensors, each.replacements = tensors, self._replacements.count

    def release(self) -> None:
        """Free all graphs, of which none may be running.

        The garbage collector may call this in any thread, and when the device is gone, so the device is asked nothing.
        """
        self._captured.clear()
        self._known.clear()

    def _drop(self, found: WeightsGraphs) -> None:
        _habana.synchronize()  # The last replay may still be running.
        found.graphs.clear()
        self._captured.remove(found)
