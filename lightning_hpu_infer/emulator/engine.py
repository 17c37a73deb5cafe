"""Device queues: a thread with a FIFO each, and the tasks that run on them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from lightning_hpu_infer.emulator.timeline import DeviceSpan, Timeline

if TYPE_CHECKING:
    from lightning_hpu_infer.emulator.storage import Storage


class Task:
    """One piece of device work; `wait` blocks without the GIL until it has run.

    `kind` is what a timeline calls it, empty if it is not work of the device's own; `nbytes` is the size of a copy.
    """

    __slots__ = ("_latch", "deps", "done", "error", "finished_at", "kind", "nbytes", "queued_at", "run", "writes")

    def __init__(
        self, run: Callable[[], object], writes: Sequence[Storage] = (), *, kind: str = "", nbytes: int = 0
    ) -> None:
        self.kind = kind
        self.nbytes = nbytes
        self.run: Callable[[], object] | None = run
        self.writes: Sequence[Storage] = writes
        self.deps: list[Task] = []
        self.done = False
        self.error: BaseException | None = None
        self.queued_at = self.finished_at = 0.0
        self._latch = threading.Lock()
        self._latch.acquire()

    def execute(self) -> None:
        """Run; an error goes to the storages that should have been written, for whoever reads them."""
        assert self.run is not None
        try:
            self.run()
        except BaseException as error:
            self.error = error
            for storage in self.writes:
                storage.error = error
        # Whatever the closure holds (sources of copies, storages) must not outlive the work.
        self.run, self.writes, self.deps = None, (), []
        self.finished_at = time.perf_counter()

    def finish(self) -> None:
        """Let the waiters go on."""
        self.done = True
        self._latch.release()

    def wait(self) -> None:
        """Block until the task has run."""
        if not self.done:
            with self._latch:
                pass


class Engine:
    """A FIFO of tasks and the thread that runs them in order."""

    def __init__(self, name: str, timeline: Timeline) -> None:
        self.name = name
        self._timeline = timeline
        self.last: Task | None = None
        self.busy_s = self.idle_s = 0.0
        self.after: list[Task] = []
        """Tasks of other queues that the next one here has to wait for (``Stream.wait_event``)."""
        self._gap_from = 0.0
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._gate = threading.Event()
        self._gate.set()
        self._pauses = 0
        self._thread = threading.Thread(target=self._loop, name=f"hpu-emulator-{name}", daemon=True)
        self._thread.start()

    def submit(self, task: Task, reads: Iterable[Storage] = (), writes: Iterable[Storage] = ()) -> Task:
        """Queue `task` behind whatever wrote `reads`, and wrote or read `writes`, on other queues.

        Order within this queue is FIFO and needs no entry. Stream 0 orders its queues by address in the same way
        (bridge: hpu_habana_cache.cpp:1558-1585).
        """
        deps: list[Task] = self.after
        self.after = []
        for storage in reads:
            if (writer := storage.writer) is not None and not writer.done:
                deps.append(writer)
            storage.readers[self] = task
        for storage in writes:
            if (writer := storage.writer) is not None and not writer.done:
                deps.append(writer)
            if storage.readers:
                deps.extend(reader for reader in storage.readers.values() if not reader.done and reader is not task)
                storage.readers.clear()
            storage.writer = task
            storage.virgin = False
        task.deps = deps
        task.queued_at = time.perf_counter()
        self.last = task
        self._queue.put(task)
        return task

    def pause(self) -> None:
        """Start no further task until `resume`."""
        self._pauses += 1
        self._gate.clear()

    def resume(self) -> None:
        """Undo one `pause`."""
        self._pauses -= 1
        if self._pauses == 0:
            self._gate.set()

    def drain(self) -> None:
        """Wait until everything queued so far has run."""
        if self.last is not None:
            self.last.wait()

    def stop(self) -> None:
        """Run what is queued, then end the thread."""
        self._gate.set()
        self._queue.put(None)
        self._thread.join()

    def reset_times(self) -> None:
        """Forget busy and idle time."""
        self.busy_s = self.idle_s = self._gap_from = 0.0

    def _loop(self) -> None:
        # Values are private to the emulator, so autograd's bookkeeping is only cost. The mode is per thread.
        with torch.inference_mode():
            while (task := self._queue.get()) is not None:
                for dep in task.deps:
                    dep.wait()
                self._gate.wait()
                start = time.perf_counter()
                if self._gap_from:
                    self.idle_s += start - self._gap_from
                task.execute()
                self._gap_from = task.finished_at
                self.busy_s += task.finished_at - start
                if task.kind and (spans := self._timeline.spans) is not None:
                    spans.append(DeviceSpan(self.name, task.kind, task.queued_at, start, task.finished_at, task.nbytes))
                task.finish()
                del task


def sleep_until(deadline: float) -> None:
    """Sleep to `deadline` on the `time.perf_counter` clock; never holds the GIL."""
    while (rest := deadline - time.perf_counter()) > 0:
        time.sleep(rest)
