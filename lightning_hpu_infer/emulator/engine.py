"""Device queues: each is a thread with a FIFO of tasks, ordered among queues by the memory that they use."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterable

import torch

from lightning_hpu_infer.emulator.storage import Storage
from lightning_hpu_infer.emulator.task import Task
from lightning_hpu_infer.emulator.timeline import DeviceSpan, Timeline


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
        self._queue: queue.SimpleQueue[tuple[Task, Collection[Storage]] | None] = queue.SimpleQueue()
        self._gate = threading.Event()
        self._gate.set()
        self._pauses = 0
        self._thread = threading.Thread(target=self._loop, name=f"hpu-emulator-{name}", daemon=True)
        self._thread.start()

    def submit(self, task: Task, reads: Iterable[Storage] = (), writes: Collection[Storage] = ()) -> Task:
        """Queue `task` after the tasks of other queues that wrote `reads`, or wrote or read `writes`.

        Order within this queue is FIFO and needs no entry. Stream 0 orders its queues by address in the same way
        (bridge: hpu_habana_cache.cpp:1558-1585). If the task fails, reading `writes` raises its error.
        """
        deps: list[Task] = self.after
        self.after = []
        for storage in reads:
            if (writer := storage.writer) is not None and not writer.done:
                deps.append(writer)
            storage.readers[self.name] = task
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
        self._queue.put((task, writes))
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
            while (queued := self._queue.get()) is not None:
                self._run(*queued)
                del queued  # a task and its storages must not stay alive while the queue is empty

    def _run(self, task: Task, writes: Collection[Storage]) -> None:
        for dep in task.deps:
            dep.wait()
        self._gate.wait()
        start = time.perf_counter()
        if self._gap_from:
            self.idle_s += start - self._gap_from
        task.execute()
        end = self._gap_from = task.finished_at = time.perf_counter()
        self.busy_s += end - start
        if task.error is not None:
            for storage in writes:
                storage.error = task.error
        if task.kind and (spans := self._timeline.spans) is not None:
            spans.append(DeviceSpan(self.name, task.kind, task.queued_at, start, end, task.nbytes))
        task.finish()


def sleep_until(deadline: float) -> None:
    """Sleep to `deadline` on the `time.perf_counter` clock, without the GIL."""
    while (rest := deadline - time.perf_counter()) > 0:
        time.sleep(rest)
