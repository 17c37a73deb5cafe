"""What the device did when: a record that is made on request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceSpan:
    """One piece of work of the emulated device; times are seconds of `time.perf_counter`."""

    queue: str
    """``"compute"``, ``"h2d"`` or ``"d2h"``; ``"stream-N"`` for all work of a stream other than the default one."""
    kind: str
    """``"compute"`` (a program), ``"compile"`` (``EmulatorConfig.compile_ms`` before a new one) or ``"copy"``."""
    queued_at: float
    """When the host handed it over."""
    start: float
    """When the queue began with it, the work that it waits for being done."""
    end: float
    nbytes: int
    """Size of a copy; 0 otherwise."""


class Timeline:
    """Where all queues of a device write their spans."""

    __slots__ = ("spans",)

    def __init__(self) -> None:
        self.spans: list[DeviceSpan] | None = None
        """None while nothing is recorded."""

    def start(self) -> None:
        """Record from now on, with an empty list."""
        self.spans = []

    def stop(self) -> list[DeviceSpan]:
        """Record no more, and return what has run meanwhile in the order in which it started."""
        spans, self.spans = self.spans, None
        return sorted(spans or (), key=lambda span: span.start)
