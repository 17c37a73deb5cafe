"""Streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from habana_frameworks.torch import _hpu_C
from habana_frameworks.torch.hpu._utils import _get_device_index
from habana_frameworks.torch.utils.internal import is_lazy

__all__ = [
    "Stream",
    "current_stream",
    "default_stream",
    "get_stream_info",
    "record_stream",
    "set_stream",
    "stream",
]


class Stream(_hpu_C._HpuStreamBase):
    """A queue of device work; both arguments of the constructor are unused."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        """Return a new stream, or the one that `stream_id` names."""
        return super().__new__(cls, priority=priority, **kwargs)

    def id(self) -> int:
        """Return the number of the stream; the default one is 0."""
        return self.stream_id

    def wait_event(self, event: Any) -> None:
        """Let later work of this stream wait for the event."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """Let later work of this stream wait for what the other one has queued."""
        self.wait_event(stream.record_event())

    def record_event(self, event: Any = None) -> Any:
        """Record an event on this stream."""
        from habana_frameworks.torch.hpu.events import Event

        event = event if event is not None else Event()
        event.record(self)
        return event

    def __repr__(self) -> str:
        return f"<torch.hpu.Stream device={self.device} stream_id={self.stream_id}>"


# A global in lazy mode and not one per thread, as on the bridge (streams.py:231-291).
_current: list[Stream] = []


def _where(stream: Stream) -> dict[str, int]:
    return {"stream_id": stream.stream_id, "device_index": 0, "device_type": stream.device_type}


def default_stream(device: Any = None) -> Stream:
    """Return stream 0."""
    _hpu_C._hpu_getDefaultStream(_get_device_index(device, optional=True))
    return Stream(is_default_stream=True)


def current_stream(device: Any = None) -> Stream:
    """Return the stream that work goes to."""
    if _current:
        return _current[0]
    stream_id, _, _ = _hpu_C._hpu_getCurrentStream(_get_device_index(device, optional=True))
    found = Stream(stream_id=stream_id, is_default_stream=not stream_id)
    if is_lazy():
        _current[:] = [found]
    return found


def set_stream(stream: Stream | None) -> None:
    """Make `stream` current."""
    if stream is not None and current_stream() != stream:
        if is_lazy():
            _current[:] = [stream]
        _hpu_C._hpu_setStream(**_where(stream))


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Make `stream` current inside the context."""
    before = current_stream()
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


def get_stream_info(stream: Stream) -> tuple[torch.device, int]:
    """Return device and number of a stream."""
    return _hpu_C._hpu_getStreamInfo(**_where(stream))


def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    """Note that `stream` uses the tensor."""
    _hpu_C.record_stream(tensor, *_where(stream).values())
