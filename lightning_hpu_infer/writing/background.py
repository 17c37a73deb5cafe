"""A thread that writes what it is given, behind a queue that is bounded in bytes."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Generic, TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Background(Generic[T]):
    """Calls `write` for each item, in order, in one thread.

    An error of `write` ends the thread and drops what waits. It is raised once: by the next `put`, or by `close`.

    Args:
        write: What to call, in the thread.
        max_bytes: What may wait and be written at a time. A larger item is let in alone.
        name: The thread's.
        on_done: Told when each call began and ended, in seconds of `time.perf_counter`, and its item; in the thread.
    """

    def __init__(
        self,
        write: Callable[[T], None],
        max_bytes: int,
        name: str = "hpu-infer-writer",
        on_done: Callable[[float, float, T], None] | None = None,
    ) -> None:
        self._write = write
        self._max_bytes = max_bytes
        self._on_done = on_done
        self._items: deque[tuple[T, int, str]] = deque()
        self._bytes = 0
        """Of what waits and what is being written."""
        self._changed = threading.Condition()
        self._closed = False
        self._failed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T, nbytes: int, where: str = "") -> None:
        """Hand over an item; wait until there is room for it.

        Args:
            item: Nobody else may change it afterwards.
            nbytes: Its size.
            where: What an error of its writing names, such as the batch.

        Raises:
            BaseException: What writing an earlier item raised.
            RuntimeError: If it is closed, or has failed before.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failed or not self._bytes or self._bytes + nbytes <= self._max_bytes)
            self._raise()
            if self._closed or self._failed:
                raise RuntimeError(f"{self._thread.name} has ended{' by an error' * self._failed}. It takes no more.")
            self._items.append((item, nbytes, where))
            self._bytes += nbytes
            self._changed.notify_all()

    def close(self, drain: bool = True) -> None:
        """End the thread, and wait for it. May be called again.

        Args:
            drain: Whether what waits is written first. What is being written is finished in any case.

        Raises:
            BaseException: What writing raised, unless `put` has raised it.
        """
        with self._changed:
            self._closed = True
            if not drain:
                self._items.clear()
            self._changed.notify_all()
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            item, nbytes, where = taken
            start = perf_counter()
            try:
                self._write(item)
                if self._on_done is not None:
                    self._on_done(start, perf_counter(), item)
            except BaseException as error:
                self._fail(error, where)
                return
            # Not kept until the next one comes.
            del item, taken
            with self._changed:
                self._bytes -= nbytes
                self._changed.notify_all()

    def _take(self) -> tuple[T, int, str] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            return self._items.popleft() if self._items else None

    def _fail(self, error: BaseException, where: str) -> None:
        if where:
            note = f"Raised while {where} was written, in a thread."
            if hasattr(error, "add_note"):
                error.add_note(note)
            else:  # Python 3.10
                _log.error("%s: %s", type(error).__name__, note)
        with self._changed:
            self._failed, self._error = True, error
            self._items.clear()
            self._bytes = 0
            self._changed.notify_all()
