"""One piece of device work, which other work and the host can wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Task:
    """One piece of device work. Any thread may wait for it.

    Args:
        run: What to do, called once by the thread of the queue that the task is submitted to.
        kind: What a timeline calls it; empty if it is no work of the device.
        nbytes: The size of a copy; 0 otherwise.
    """

    __slots__ = ("_latch", "deps", "done", "error", "finished_at", "kind", "nbytes", "queued_at", "run")

    def __init__(self, run: Callable[[], object], *, kind: str = "", nbytes: int = 0) -> None:
        self.kind = kind
        self.nbytes = nbytes
        self.run: Callable[[], object] | None = run
        self.deps: list[Task] = []
        """Tasks of other queues that have to be done before this one starts."""
        self.done = False
        self.error: BaseException | None = None
        """What `run` raised. Set before `done`."""
        self.queued_at = self.finished_at = 0.0
        """Seconds of `time.perf_counter`, noted by the queue."""
        self._latch = threading.Lock()
        self._latch.acquire()

    def execute(self) -> None:
        """Run, and keep an error for those who wait or read the results."""
        assert self.run is not None
        try:
            self.run()
        except BaseException as error:
            self.error = error
        # The closure refers to sources of copies and to storages, which must not outlive the work.
        self.run, self.deps = None, []

    def finish(self) -> None:
        """Release those who wait."""
        self.done = True
        self._latch.release()

    def wait(self) -> None:
        """Block without the GIL until the task has run."""
        if not self.done:
            with self._latch:
                pass
