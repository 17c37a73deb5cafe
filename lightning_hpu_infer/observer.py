"""The stages of a batch, and the interface of what observes them while a run goes on.

A stage in which nothing can happen, such as hooks that nobody overrides, is not observed.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Lane(str, Enum):
    """Where a span took place: a host thread or a queue of the device."""

    PREFETCH = "prefetch thread"
    MAIN = "main thread"
    H2D = "copy to device"
    DEVICE = "device"
    D2H = "copy to host"
    WRITER = "writer thread"
    POSTPROCESS = "post-processing"
    """Threads or processes, several at once."""


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
    TRACE = "trace"
    """TorchDynamo traces the step, or traces it anew. Inside of `LAUNCH`."""
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
    POSTPROCESS = "postprocess"
    """The user's function on one output: on lane `POSTPROCESS`, or in place on lane `MAIN`."""
    WAIT_POSTPROCESS = "wait for postprocess"
    """The main thread waits until the oldest output is post-processed."""
    WRITE = "write"
    """`PredictionWriter`'s thread turns a prediction into Arrow's form and writes it, on lane `WRITER`."""
    WAIT_WRITER = "wait for writer"
    """The main thread waits until there is room in the writer's queue. Inside of `END_HOOKS`."""
    DEVICE = "compute"
    """A program of the device, on lane `DEVICE`."""
    COMPILE = "compile"
    """Compilation of a new program, on lane `DEVICE`."""
    H2D = "copy to device"
    D2H = "copy to host"


WAITS = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT, Stage.WAIT_POSTPROCESS, Stage.WAIT_WRITER)
"""Stages in which the main thread does nothing."""


class Observer:
    """Observes the stages of a run and changes nothing. This one observes nothing, which costs nothing.

    A stage is observed by wrapping the function that does its work, once per run; `wrap` returns the function itself
    where there is nothing to observe. A lane is used by one thread only, which may be any.
    """

    records = False
    """Whether spans are recorded. Waiting for an output is then kept apart from copying it."""

    def wrap(self, stage: Stage, function: Callable[..., T], lane: Lane = Lane.MAIN) -> Callable[..., T]:
        """The function to call in place of `function`, so that the stage is observed."""
        return function

    def timed(self, stage: Stage, function: Callable[..., T], *args: Any) -> T:
        """Call `function` once, on the main thread."""
        return function(*args)

    def at(self, batch: int | None, lane: Lane = Lane.MAIN) -> None:
        """Note the index of the batch that the lane's thread works on from now on."""

    def add(self, stage: Stage, lane: Lane, start: float, end: float, batch: int | None) -> None:
        """Note a span that was measured elsewhere, in seconds of `time.perf_counter`. Main thread only."""

    def completed(self, output: Any) -> None:
        """Note that the oldest batch in flight has its output, on the host if anybody wants it there."""


class Observers(Observer):
    """Several observers as one; the first is the innermost."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self.records = any(observer.records for observer in observers)

    def wrap(self, stage: Stage, function: Callable[..., T], lane: Lane = Lane.MAIN) -> Callable[..., T]:
        """Wrap the function by every observer."""
        for observer in self._observers:
            function = observer.wrap(stage, function, lane)
        return function

    def timed(self, stage: Stage, function: Callable[..., T], *args: Any) -> T:
        """Call the function, observed by every observer."""
        for observer in self._observers:
            function = partial(observer.timed, stage, function)
        return function(*args)

    def at(self, batch: int | None, lane: Lane = Lane.MAIN) -> None:
        """Tell every observer."""
        for observer in self._observers:
            observer.at(batch, lane)

    def add(self, stage: Stage, lane: Lane, start: float, end: float, batch: int | None) -> None:
        """Tell every observer."""
        for observer in self._observers:
            observer.add(stage, lane, start, end, batch)

    def completed(self, output: Any) -> None:
        """Tell every observer."""
        for observer in self._observers:
            observer.completed(output)
