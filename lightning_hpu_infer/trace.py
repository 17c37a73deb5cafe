"""Spans of every stage of every batch. With tracing off there is nothing to call, so nothing to pay."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


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
    """A network's first calls with a new key: watched, captured, verified. Inside of `LAUNCH`."""
    REPLAY = "replay"
    """A network's graph is replayed. Inside of `LAUNCH`."""
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
    """Records what one host thread does."""

    def __init__(self, lane: Lane, records: deque[tuple[Any, ...]]) -> None:
        self._lane = lane
        self._records = records
        self.batch: int | None = None
        """The batch that the thread works on."""

    def wrap(self, stage: Stage, function: F) -> F:
        """`function`, with a span around each call, also one that raises."""
        lane, append, clock = self._lane, self._records.append, time.perf_counter

        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                append((stage, lane, start, clock(), self.batch))

        return call  # type: ignore[return-value]


class Trace:
    """The spans of a run, of which the newest million are kept."""

    def __init__(self) -> None:
        self._records: deque[tuple[Any, ...]] = deque(maxlen=1_000_000)
        self.main = LaneTrace(Lane.MAIN, self._records)
        self.prefetch = LaneTrace(Lane.PREFETCH, self._records)

    def spans(self) -> list[Span]:
        """What was recorded, in the order in which it ended."""
        return [Span(*record) for record in self._records]
