"""Streams and events at the C level."""

from __future__ import annotations

import itertools
import time

from lightning_hpu_infer.emulator import runtime
from lightning_hpu_infer.emulator.engine import Engine
from lightning_hpu_infer.emulator.task import Task

MAX_STREAMS = 32
"""Beyond this many streams the queues are shared in turn (bridge: device.cpp:664-669)."""
_ids = itertools.count()


def new_stream() -> int:
    """Return the id of a stream other than the default one."""
    return 1 + next(_ids) % MAX_STREAMS


def engines_of(stream_id: int) -> list[Engine]:
    """Return the queues of a stream: three for stream 0 (bridge: device.cpp:952-994), one for any other."""
    rt = runtime.current()
    return [rt.stream_engine(stream_id)] if stream_id else [rt.compute, rt.h2d, rt.d2h]


def synchronize(stream_id: int) -> None:
    """Launch what is pending and wait for what the stream has queued."""
    rt = runtime.current()
    rt.flush("synchronize")
    rt.wait_all(engine.last for engine in engines_of(stream_id))


def query(stream_id: int) -> bool:
    """Tell whether everything queued on the stream has run."""
    return all(engine.last is None or engine.last.done for engine in engines_of(stream_id))


class EventState:
    """What had been queued on a stream when the event was recorded."""

    def __init__(self) -> None:
        self._tasks: list[Task] | None = None
        self._recorded_at = 0.0

    def record(self, stream_id: int) -> None:
        """Remember the work of the stream; launches what is pending (bridge: HPUEvent.cpp:91-97)."""
        rt = runtime.current()
        if stream_id == rt.stream_id:
            rt.flush("event_record")
        self._tasks = [engine.last for engine in engines_of(stream_id) if engine.last is not None]
        self._recorded_at = time.perf_counter()

    def query(self) -> bool:
        """Tell whether that work has run; True if never recorded."""
        return all(task.done for task in self._tasks or ())

    def synchronize(self) -> None:
        """Wait for that work; a pageable destination of an asynchronous copy may still be empty then.

        An error of a copy to the host is raised here, since its destination does not show it.
        """
        rt = runtime.current()
        rt.wait_all(self._tasks or ())
        error, rt.uncopied = rt.uncopied, None
        if error is not None:
            raise error

    def block(self, stream_id: int) -> None:
        """Let everything that is queued on the stream from now on wait for that work."""
        runtime.current().flush("stream_switch")
        for engine in engines_of(stream_id):
            engine.after = [*engine.after, *(self._tasks or ())]

    def elapsed_ms(self, end: EventState) -> float:
        """Return the time between two finished events."""
        return (end._time() - self._time()) * 1e3

    def _time(self) -> float:
        if self._tasks is None or not self.query():
            raise RuntimeError("elapsed_time needs two recorded events whose work has finished; synchronize them first")
        return max([self._recorded_at, *(task.finished_at for task in self._tasks)])
