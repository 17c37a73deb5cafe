"""Streams and events at the C level: ``_hpu_C._HpuStreamBase``, ``_hpu_C._HpuEventBase`` and the current stream."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

from lightning_hpu_infer.emulator import runtime
from lightning_hpu_infer.emulator.engine import Engine
from lightning_hpu_infer.emulator.task import Task

DEVICE_TYPE = int(getattr(torch._C._autograd.DeviceType, "HPU"))  # noqa: B009 - its type has no __int__ for mypy
MAX_STREAMS = 32
"""Beyond this many streams the queues are shared in turn (bridge: device.cpp:664-669)."""
_stream_ids, _event_ids = itertools.count(), itertools.count(1)


def engines_of(stream_id: int) -> list[Engine]:
    """Return the queues of a stream: three for stream 0 (bridge: device.cpp:952-994), one for any other."""
    rt = runtime.current()
    return [rt.stream_engine(stream_id)] if stream_id else [rt.compute, rt.h2d, rt.d2h]


def _queued(stream_id: int) -> list[Task]:
    return [engine.last for engine in engines_of(stream_id) if engine.last is not None]


def _wait_for(stream_id: int, tasks: list[Task]) -> None:
    """Let everything that is queued on the stream from now on wait for `tasks`."""
    for engine in engines_of(stream_id):
        engine.after = [*engine.after, *tasks]


def set_current(stream_id: int) -> None:
    """Make another stream current.

    In eager mode a stream that is entered from stream 0 waits for what is queued there (bridge: HPUStream.cpp:226-236).
    """
    rt = runtime.current()
    from_default = stream_id != 0 and rt.stream_id == 0
    rt.set_stream(stream_id)
    if from_default and not rt.config.lazy:
        _wait_for(stream_id, _queued(0))


class HpuStreamBase(torch.Stream):
    """``_HpuStreamBase``: a queue of device work, or four of them if it is the default stream."""

    stream_id: int

    def __new__(
        cls,
        priority: int = 0,
        stream_id: int = 0,
        device_index: int = 0,
        device_type: int = 0,
        stream_ptr: int = 0,
        is_default_stream: bool = False,
    ) -> HpuStreamBase:
        """Return the stream with that id; without one a new stream (bridge: Stream.cpp:36-98)."""
        if is_default_stream:
            stream_id = 0
        elif not (stream_id or device_index):
            stream_id = stream_ptr or 1 + next(_stream_ids) % MAX_STREAMS
        new: Any = torch.Stream.__new__
        stream: HpuStreamBase = new(cls, stream_id=stream_id, device_index=device_index, device_type=DEVICE_TYPE)
        return stream

    @property
    def hpu_stream(self) -> int:
        """The handle, which is the id."""
        return self.stream_id

    @property
    def priority(self) -> int:
        """All streams have the same."""
        return 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the least and the greatest priority."""
        return 0, 0

    def query(self) -> bool:
        """Tell whether everything queued has run; launches what is pending unless this stream is the current one."""
        self._flush("query")
        return all(task.done for task in _queued(self.stream_id))

    def synchronize(self) -> None:
        """Wait for what is queued; what is pending on the current stream stays so (bridge: HPUStream.cpp:133-158)."""
        self._flush("synchronize")
        runtime.current().wait_all(_queued(self.stream_id))

    def _flush(self, cause: str) -> None:
        rt = runtime.current()
        if self.stream_id != rt.stream_id:
            rt.flush(cause)
        elif cause == "synchronize":
            rt.join_launches()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HpuStreamBase) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(("hpu", self.stream_id))


class HpuEventBase(torch.Event):
    """``_HpuEventBase``: what had been queued on a stream when the event was recorded."""

    _tasks: list[Task] | None
    _stream_id: int
    _recorded_at: float
    _id: int

    def __new__(cls, enable_timing: bool = False) -> HpuEventBase:
        """Return an event that was not recorded; times are measured in any case."""
        new: Any = torch.Event.__new__
        event: HpuEventBase = new(cls, device="hpu")
        event._tasks, event._stream_id, event._recorded_at, event._id = None, 0, 0.0, 0
        return event

    @property
    def hpu_event(self) -> int:
        """The handle; 0 before the first recording."""
        return self._id

    @property
    def device(self) -> torch.device | None:  # type: ignore[override]
        """Where it was recorded; None before."""
        return torch.device("hpu", 0) if self._id else None

    def record(self, stream: HpuStreamBase) -> None:  # type: ignore[override]
        """Remember the work of the stream; launches what is pending on it (bridge: HPUEvent.cpp:91-97)."""
        rt = runtime.current()
        if stream.stream_id == rt.stream_id:
            rt.flush("event_record")
        self._id = self._id or next(_event_ids)
        self._stream_id, self._tasks = stream.stream_id, _queued(stream.stream_id)
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

    def wait(self, stream: HpuStreamBase) -> None:  # type: ignore[override]
        """Let what is launched on the stream from now on wait for that work, unless it was recorded there."""
        if self._tasks is not None and stream.stream_id != self._stream_id:
            _wait_for(stream.stream_id, self._tasks)

    def elapsed_time(self, end: HpuEventBase) -> float:  # type: ignore[override]
        """Return the nanoseconds between two events, which the Python layer divides (bridge: events.py:81)."""
        if self._tasks is None or end._tasks is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return (end._time() - self._time()) * 1e9

    def _time(self) -> float:
        tasks = self._tasks or ()
        if not self.query():
            raise RuntimeError("elapsed_time needs events whose work has finished; call synchronize() of both first")
        return max([self._recorded_at, *(task.finished_at for task in tasks)])
