"""The captured graphs of one FX graph: found by the weights and the shape of a call, bounded, dropped when unused."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_
from typing import Any

from torch import Tensor

from lightning_hpu_infer import _habana
from lightning_hpu_infer.graphs.replacements import DataReplacements

Key = tuple[Any, ...]
"""What tells calls apart: Python numbers, shapes, strides and dtypes of tensors, values on the host."""

# Shapes, and sets of weights, that are remembered without a graph.
_MAX_KNOWN = 1024


@dataclass
class Captured:
    """One captured graph."""

    run: Callable[..., list[Tensor]]
    """Takes the tensors that change from call to call; its results are overwritten by the next call."""
    carried: list[Tensor]
    """Memory of its own in place of inputs that it writes to and that are no buffers of the model."""
    to_verify: int = 0
    """Calls that are still to be compared with the plain ops."""
    nbytes: int = 0
    """Device memory that the capture took, roughly."""
    used: int = 0
    """The call that used it last."""


@dataclass
class Candidate:
    """A shape without a graph."""

    seen: int = 0
    since: int = 0
    """The call that `seen` counts from."""
    evicted: bool = False
    plain: str = ""
    """Why it will never have a graph."""
    may_pad: bool = True
    padded: bool = False
    """Whether it was run in a larger graph before."""


@dataclass(eq=False)
class WeightsGraphs:
    """Graphs that were captured with the same tensors: they read this memory, whatever the model holds."""

    tensors: tuple[Any, ...]
    """Those tensors; their `id`s while there is no graph, so that nothing is kept alive."""
    replacements: int
    """How many replacements of tensor data were looked at."""
    used: int
    """The call that found them last."""
    graphs: OrderedDict[Key, Captured] = field(default_factory=OrderedDict)
    """Least recently used first."""
    candidates: OrderedDict[Key, Candidate] = field(default_factory=OrderedDict)
    frozen: bool = False
    """Whether no graph may take another one's place any more."""
    refused: int = 0
    """How often there was no place for a graph."""

    def candidate(self, key: Key) -> Candidate:
        """What is known of a shape without a graph."""
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
        """The least recently used graph, if a new shape may take its place.

        It may if the shape came twice since that graph was used: more shapes in turn than there may be graphs would
        replace each other without end. A shape whose graph was dropped and that comes back shows the same.
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
    """All captured graphs of one FX graph, by the tensors that they were captured with.

    Args:
        replacements: Knows which tensors were given other memory.
    """

    def __init__(self, replacements: DataReplacements) -> None:
        self._replacements = replacements
        self._captured: list[WeightsGraphs] = []
        self._known: dict[tuple[int, ...], WeightsGraphs] = {}
        """Those without a graph, by the `id`s of their tensors."""
        self.dropped = 0
        """How often graphs were dropped since a tensor of theirs was given other memory."""

    def __bool__(self) -> bool:
        return any(each.graphs for each in self._captured)

    def find(self, tensors: tuple[Any, ...], call: int) -> WeightsGraphs:
        """The graphs that were captured with these very tensors; without any graph if there are none."""
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
        """Keep a graph, and from its first one on the tensors that it was captured with."""
        if not any(each is found for each in self._captured):
            self._known.pop(found.tensors, None)
            found.tensors, found.replacements, found.used = tensors, self._replacements.count, call
            # Some are gone for good, a few may come back: an adapter, say. Blocks that share this are all in use.
            limit = 16 + 4 * len(self._captured)
            for unused in [each for each in self._captured if call - each.used > limit]:
                self._drop(unused)
            self._captured.append(found)
        found.graphs[key] = graph
        found.candidates.pop(key, None)
        graph.used = call

    def rebind(self, now: dict[int, Tensor | None]) -> None:
        """Take other tensor objects for those of an earlier run.

        Args:
            now: Per former tensor, by `id`, the one that shows its memory; None if no tensor does.
        """
        self._known.clear()
        for each in list(self._captured):
            tensors = tuple(now.get(id(tensor), tensor) for tensor in each.tensors)
            if any(tensor is None for tensor in tensors):
                self._drop(each)
            each.tensors, each.replacements = tensors, self._replacements.count

    def clear(self) -> None:
        """Free all graphs, of which none may be running.

        The garbage collector may do so, in any thread and where the device is gone, so the device is asked nothing.
        """
        self._captured.clear()
        self._known.clear()

    def _drop(self, found: WeightsGraphs) -> None:
        _habana.synchronize()  # The last replay may still be running.
        found.graphs.clear()
        self._captured.remove(found)
