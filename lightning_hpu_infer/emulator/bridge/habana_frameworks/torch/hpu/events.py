"""Events."""

from __future__ import annotations

from typing import Any

from habana_frameworks.torch import _hpu_C
from habana_frameworks.torch.hpu import streams

__all__ = ["Event"]


class Event(_hpu_C._HpuEventBase):
    """A point in a stream's work."""

    def record(self, stream: Any = None) -> None:
        """Mark what the stream has queued; the current stream by default."""
        super().record(stream if stream is not None else streams.current_stream())

    def wait(self, stream: Any = None) -> None:
        """Let later work of the stream wait for the event."""
        super().wait(stream if stream is not None else streams.current_stream())

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds between two events."""
        return super().elapsed_time(end_event) / 1e6

    def __repr__(self) -> str:
        return f"<torch.hpu.Event {self.hpu_event or 'that was not recorded'}>"
