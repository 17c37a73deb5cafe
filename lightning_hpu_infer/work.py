"""A batch that was submitted, and the bound on how many there may be."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lightning_hpu_infer.lengths.buckets import Lengths

_log = logging.getLogger(__name__)

CLOSED = "This pipeline is closed: make another one."
FORKED = "This pipeline was made before this process was forked, which has no thread of it: make one in each process."
_WHEN_FULL = "Wait for a result first, or pass `when_full='wait'`."
_WAITS = (
    "The pipeline's own thread, in which callbacks of futures and the model run, would wait for a result that it has to"
    " compute itself. Wait in another thread, or in the callback of that result."
)
_IN_CALLBACK = "The pipeline's own thread, in which callbacks of futures run, cannot wait: submit from another one."


class Result(Future[Any]):
    """A future whose callbacks cannot end the thread that calls them, and which that thread does not wait for.

    Args:
        thread: The identifier of the thread that computes it.
    """

    def __init__(self, thread: int | None = None) -> None:
        super().__init__()
        self._thread = thread

    def result(self, timeout: float | None = None) -> Any:
        """Wait for it.

        Raises:
            RuntimeError: If it would be waited for without an end.
        """
        self._check(timeout)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for its error.

        Raises:
            RuntimeError: If it would be waited for without an end.
        """
        self._check(timeout)
        return super().exception(timeout)

    def _check(self, timeout: float | None) -> None:
        if timeout is None and self._thread == threading.get_ident() and not self.done():
            raise RuntimeError(_WAITS)

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Have a function called when the result is there."""

        def call(future: Future[Any]) -> None:
            try:
                fn(future)
            except Exception:
                raise  # which the base class logs
            except BaseException as error:
                if threading.current_thread() is threading.main_thread():
                    raise  # as Ctrl-C does
                _log.exception("A callback of a future raised %s, which ends nothing here.", type(error).__name__)

        super().add_done_callback(call)


@dataclass(slots=True, eq=False)
class Work:
    """A batch that was submitted, from its preparation to its result."""

    index: int
    """Its index among all of the pipeline."""
    batch: Any
    """Prepared on the host; None once it is on the device."""
    batch_idx: int
    """What the step is told, and what messages name: its index among those that came the same way."""
    lengths: Lengths | None = None
    """Its length before and after padding; None if it was not padded."""
    on_end: Callable[[], object] | None = None
    """Called before the future is done, when the batch takes up no place any more."""
    future: Future[Any] = field(default_factory=Result)

    def __str__(self) -> str:
        """Its name in messages."""
        return f"batch {self.batch_idx}"

    def begin(self) -> bool:
        """Whether it is to be computed, which nobody can cancel from now on."""
        if self.future.set_running_or_notify_cancel():
            return True
        self._end()
        return False

    def succeed(self, result: Any) -> None:
        """Give the result to whoever waits for it."""
        self._end()
        self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Give the error to whoever waits for the result."""
        self._end()
        self.future.set_exception(error)

    def cancel(self) -> None:
        """Do not compute it."""
        self.future.cancel()
        self.begin()

    def _end(self) -> None:
        self.batch = None
        if self.on_end is not None:
            self.on_end()


class Closable(Protocol):
    """What `Room` asks of an engine."""

    @property
    def closed(self) -> bool:
        """Whether nothing can be submitted any more."""

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is the thread that makes room."""


class Room:
    """Places for a bounded number of batches. Any thread.

    Args:
        size: How many there are.
        when_full: Whether to "wait" for a place, or "raise".
        engine: Whose places these are.
    """

    def __init__(self, size: int, when_full: Literal["wait", "raise"], engine: Closable) -> None:
        self._size = size
        self._waits = when_full == "wait"
        self._engine = engine
        self._taken = 0
        self._changed = threading.Condition()

    def enter(self) -> None:
        """Take a place, when there is one.

        Raises:
            RuntimeError: If the engine is closed, also meanwhile, or this must not wait.
        """
        with self._changed:
            while self._taken >= self._size and not self._engine.closed:
                if not self._waits or self._engine.is_this_thread:
                    raise RuntimeError(
                        f"The pipeline is full: {self._taken} batches were submitted and not computed (`max_pending`)."
                        f" {_IN_CALLBACK if self._waits else _WHEN_FULL}"
                    )
                try:
                    self._changed.wait()
                except BaseException:  # Ctrl-C, maybe behind the notice of a place, which is another one's now
                    self._changed.notify()
                    raise
            if self._engine.closed:
                self._changed.notify_all()  # whatever ended it, nobody waits on
                raise RuntimeError(CLOSED)
            self._taken += 1

    def leave(self) -> None:
        """Give the place back."""
        with self._changed:
            self._taken -= 1
            self._changed.notify()

    def look_again(self) -> None:
        """Wake who waits, after the engine was closed."""
        with self._changed:
            self._changed.notify_all()
