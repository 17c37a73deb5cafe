"""What every lane did at each moment of a run, and why the device was idle."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import WAITS, Lane, Stage

_SATURATED = 0.9  # share of the time from which a lane that works is the one that all others wait for


class State(NamedTuple):
    """The innermost stage that each lane is in at one moment, in the order of `Lane`; None outside of all stages."""

    prefetch: Stage | None
    main: Stage | None
    h2d: Stage | None
    device: Stage | None
    d2h: Stage | None
    writer: Stage | None
    postprocess: Stage | None

    @property
    def computing(self) -> bool:
        """Whether the device runs a program."""
        return self.device == Stage.DEVICE

    def working(self) -> list[Lane]:
        """The lanes that neither wait nor do nothing."""
        # A blocking copy of a result waits for the device first.
        waits = [None, *WAITS, Stage.COMPILE, *[Stage.COPY_OUT] * self.computing]
        # That one worker works says nothing of the others: the lane is full when the main thread waits for it.
        lanes = zip(Lane, self, strict=True)
        return [lane for lane, stage in lanes if stage not in waits and lane != Lane.POSTPROCESS]

    def cause(self, pace: Lane | None) -> Stage | None:
        """What an idle device waits for; None is host work outside of all stages.

        Compilation comes first, then what the lane `pace` works on, if one sets the pace: the main thread's speed makes
        no difference there. Otherwise it is what the main thread is in, and while that waits, what it waits for.
        """
        if Stage.COMPILE in self:
            return Stage.COMPILE
        stage = dict(zip(Lane, self, strict=True))[pace or Lane.MAIN] or self.main
        if stage == Stage.WAIT_INPUT:
            return self.prefetch or stage
        if stage == Stage.WAIT_OUTPUT:
            return self.h2d or self.d2h or stage
        return stage


Piece = tuple[float, float, Stage | None]
"""A part of the device's idle time: start and end in seconds, and what the device waited for."""


def walk(spans: Sequence[Span]) -> Iterator[tuple[float, float, State]]:
    """Cut a run wherever a span starts or ends: each part's start, end and state."""
    ordered = sorted(spans, key=attrgetter("start"))
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    running: dict[Lane, list[tuple[bool, float, float, Stage]]] = {lane: [] for lane in Lane}
    begun = 0
    for left, right in pairwise(edges):
        while begun < len(ordered) and ordered[begun].start <= left:
            span = ordered[begun]
            # The innermost span began last, or ends first. While a program runs, a compilation holds nothing up.
            hidden = span.lane == Lane.DEVICE and span.stage == Stage.COMPILE
            heappush(running[span.lane], (hidden, -span.start, span.end, span.stage))
            begun += 1
        for heap in running.values():
            while heap and heap[0][2] <= left:
                heappop(heap)
        yield left, right, State(*(heap[0][3] if heap else None for heap in running.values()))


class LaneTimes:
    """How long the lanes of a run were in which stages at the same time; `spans` are all of the run's, at least one."""

    def __init__(self, spans: Sequence[Span]) -> None:
        programs = [span for span in spans if span.lane == Lane.DEVICE and span.stage == Stage.DEVICE]
        self.has_programs = bool(programs)
        self.start, self.end = min(span.start for span in spans), max(span.end for span in spans)
        # From the device's first program to its last; without a device trace, the whole run.
        self.first = min((span.start for span in programs), default=self.start)
        self.last = max((span.end for span in programs), default=self.end)
        self.inside: dict[State, float] = defaultdict(float)
        """Seconds of each state, from `first` to `last`; `outside`, those before and after."""
        self.outside: dict[State, float] = defaultdict(float)
        for left, right, state in walk(spans):
            (self.inside if self.first <= left < self.last else self.outside)[state] += right - left
        self.pace = self._pace()
        """The thread or queue that works nearly all the time, so that the others wait for it; None if there is none."""

    def _pace(self) -> Lane | None:
        work, waits = dict.fromkeys(Lane, 0.0), {Stage.WAIT_INPUT: 0.0, Stage.WAIT_OUTPUT: 0.0}
        for state, seconds in self.inside.items():
            for lane in state.working():
                work[lane] += seconds
            if state.main in waits:
                waits[state.main] += seconds
        if not self.has_programs and waits[Stage.WAIT_OUTPUT] >= waits[Stage.WAIT_INPUT]:
            return None  # the device, which was not recorded, may work more than any other lane
        busiest = max(work, key=lambda lane: work[lane])
        return busiest if work[busiest] >= _SATURATED * (self.last - self.first) > 0 else None


def device_gaps(spans: Sequence[Span]) -> list[list[Piece]]:
    """The times of a run when the device computed nothing, in order, each cut by cause."""
    pace = LaneTimes(spans).pace
    gaps: list[list[Piece]] = []
    for left, right, state in walk(spans):
        if not state.computing:
            if not gaps or gaps[-1][-1][1] < left:
                gaps.append([])
            gaps[-1].append((left, right, state.cause(pace)))
    return gaps
