"""Events."""

from __future__ import annotations

from typing import Any

from habana_frameworks.torch import _hpu_C

__all__ = ["Event"]


class Event:
    """A point in a stream's work."""

    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self.enable_timing = enable_timing
        self._state = _hpu_C.Event()

    def record(self, stream: Any = None) -> None:
        """Mark what the stream has queued; the current stream by default."""
        self._state.record(stream.stream_id if stream is not None else _hpu_C.current_stream())

    def wait(self, stream: Any = None) -> None:
        """Let later work of the stream wait for the event."""
        self._state.block(stream.stream_id if stream is not None else _hpu_C.current_stream())

    def query(self) -> bool:
        """Tell whether the event's work has run; True if never recorded."""
        return self._state.query()

    def synchronize(self) -> None:
        """Wait for the event's work."""
        self._state.synchronize()

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds between two events."""
        return self._state.elapsed_ms(end_event._state)
