"""Spans of every stage of every batch. With tracing off there is nothing to call, so nothing to pay.

A stage in which nothing can happen, such as hooks that nobody overrides, has no spans.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import inf
from time import perf_counter
from typing import Any, TypeVar

T = TypeVar("T")


class Lane(str, Enum):
    """Where a span took place: a host thread or a queue of the device."""

    PREFETCH = "prefetch thread"
    MAIN = "main thread"
    H2D = "copy to device"
    DEVICE = "device"
    D2H = "copy to host"


class Stage(str, Enum):
    """What a span was spent on. The stages of the device's lanes carry the lane's own name."""

    FETCH = "fetch"
    """`next(dataloader)`: dataset and collation."""
    PREPARE = "prepare"
    """`on_before_batch_transfer`, conversion and padding on the host."""
    PIN = "pin"
    """Copy to pinned memory."""
    WAIT_INPUT = "wait for input"
    """The main thread has no prepared batch."""
    COPY_IN = "copy in"
    """Transfer hooks: enqueue the copy to the device, and wait for it where it blocks."""
    START_HOOKS = "start hooks"
    LAUNCH = "launch"
    """`predict_step`, until all its work is enqueued."""
    CAPTURE = "capture"
    """A traced graph's first calls for a shape: plain, captured, verified. Inside of `LAUNCH`."""
    REPLAY = "replay"
    """A graph is replayed. Inside of `LAUNCH`."""
    WAIT_OUTPUT = "wait for output"
    """The main thread waits until the device has finished a batch."""
    COPY_OUT = "copy out"
    """Copy of finished outputs to the host."""
    END_HOOKS = "end hooks"
    """`on_predict_batch_end` of callbacks and module: post-processing, writers, progress bar."""
    DEVICE = "compute"
    """A program of the device, on lane `DEVICE`."""
    COMPILE = "compile"
    """Compilation of a new program, on lane `DEVICE`."""
    H2D = "copy to device"
    D2H = "copy to host"


@dataclass(frozen=True, slots=True)
class Span:
    """One stage of one batch."""

    stage: Stage
    lane: Lane
    start: float
    """Seconds on the clock of `time.perf_counter`."""
    end: float
    batch: int | None = None
    """The how-manieth batch of the run it was, from 0; None where it belongs to no single batch."""
    nbytes: int = 0
    """Bytes that were copied."""

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end - self.start


class LaneTrace:
    """Records what one host thread does: the newest half million spans."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        # Tuples of little else than numbers: they are made, and kept, beside every batch.
        self._records: deque[tuple[Stage, float, float, int | None]] = deque(maxlen=500_000)
        self.batch: int | None = None
        """The batch that the thread works on."""

    def timed(self, stage: Stage, function: Callable[..., T], *args: Any) -> T:
        """Call `function` within a span, also if it raises."""
        start = perf_counter()
        try:
            return function(*args)
        finally:
            self._records.append((stage, start, perf_counter(), self.batch))

    def wrap(self, stage: Stage, function: Callable[..., T]) -> Callable[..., T]:
        """`function`, with a span around each call."""
        return partial(self.timed, stage, function)

    @property
    def known_from(self) -> float:
        """From when on everything is there: the oldest spans of a long run have made room for newer ones."""
        return self._records[0][2] if len(self._records) == self._records.maxlen else -inf

    def spans(self) -> list[Span]:
        """What was recorded, in the order in which it ended."""
        return [Span(stage, self._lane, start, end, batch) for stage, start, end, batch in self._records]


def untimed(stage: Stage, function: Callable[..., T], *args: Any) -> T:
    """Call `function` as `LaneTrace.timed` does, without a trace."""
    return function(*args)


class Trace:
    """The host's spans of a run, thread by thread."""

    def __init__(self) -> None:
        self.main = LaneTrace(Lane.MAIN)
        self.prefetch = LaneTrace(Lane.PREFETCH)

    def spans(self) -> list[Span]:
        """What all threads recorded."""
        return self.prefetch.spans() + self.main.spans()
