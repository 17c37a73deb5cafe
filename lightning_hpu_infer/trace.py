"""Spans of every stage of every batch. With tracing off there is nothing to call, so nothing to pay."""

import threading
import time
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


class Trace:
    """Collects spans. Any thread may record; each says with `at` which batch it works on."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._here = threading.local()

    def at(self, lane: Lane, batch: int | None) -> None:
        """What the calling thread records from now on belongs to this lane and batch."""
        self._here.lane, self._here.batch = lane, batch

    def wrap(self, stage: Stage, function: F) -> F:
        """`function`, with a span around each call, also one that raises."""
        spans, here, clock = self.spans, self._here, time.perf_counter

        def call(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return function(*args, **kwargs)
            finally:
                spans.append(Span(stage, here.lane, start, clock(), here.batch))

        return call  # type: ignore[return-value]
