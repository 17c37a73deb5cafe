"""Streams."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from habana_frameworks.torch import _hpu_C
from habana_frameworks.torch.hpu.events import Event

__all__ = ["Stream", "current_stream", "default_stream", "record_stream", "set_stream", "stream"]


class Stream:
    """A queue of device work; both arguments of the constructor are unused."""

    device_index = 0
    device_type = 15  # c10::DeviceType::HPU

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.stream_id: int = kwargs["stream_id"] if "stream_id" in kwargs else _hpu_C.new_stream()
        self.is_capture = False

    @property
    def hpu_stream(self) -> int:
        """The handle."""
        return self.stream_id

    @property
    def device(self) -> torch.device:
        """The device."""
        return torch.device("hpu", 0)

    def id(self) -> int:
        """Return the number of the stream; the default one is 0."""
        return self.stream_id

    def wait_event(self, event: Event) -> None:
        """Let later work of this stream wait for the event."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """Let later work of this stream wait for what the other one has queued."""
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event on this stream."""
        event = event if event is not None else Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Tell whether everything queued has run."""
        return _hpu_C.query_stream(self.stream_id)

    def synchronize(self) -> None:
        """Wait until everything queued has run."""
        _hpu_C.synchronize_stream(self.stream_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(("hpu", self.stream_id))

    def __repr__(self) -> str:
        return f"<torch.hpu.Stream device=hpu:0 stream_id={self.stream_id}>"


# A global and not one per thread, as in the bridge in lazy mode (streams.py:231-291).
_default = Stream(stream_id=0)
_current = [_default]


def default_stream(device: Any = None) -> Stream:
    """Return stream 0."""
    return _default


def current_stream(device: Any = None) -> Stream:
    """Return the stream that work goes to."""
    return _current[0]


def set_stream(stream: Stream | None) -> None:
    """Make `stream` current."""
    if stream is not None:
        _hpu_C.set_current_stream(stream.stream_id)
        _current[0] = stream


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Make `stream` current inside the context."""
    before = current_stream()
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    """Note that `stream` uses the tensor; memory here lives as long as work on it does."""
