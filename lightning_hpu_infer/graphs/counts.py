"""What the graphs of a run did, in numbers."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class GraphCounts:
    """What the graphs of a run did."""

    traces: int = 0
    """FX graphs that TorchDynamo traced."""
    trace_seconds: float = 0.0
    """Seconds of the main thread that tracing took."""
    captures: int = 0
    """Graphs captured, or programs compiled, one per shape."""
    replays: int = 0
    """Runs of these graphs or programs."""
    padded: int = 0
    """Replays of short batches in larger graphs."""
    plain_calls: int = 0
    """Calls of a step, a network or a traced part of one that ran without a graph."""
    verified: int = 0
    """Replays, captures among them, that were compared with the plain ops."""
    evictions: int = 0
    """Graphs dropped for newer ones."""
    breaks: dict[str, int] = field(default_factory=dict)
    """How many graphs end within the step, by the reason and the user's line. Of this run and earlier ones."""
    reasons: Counter[str] = field(default_factory=Counter)
    """How many calls ran without a graph, by the reason in words."""

    def plain(self, reason: str) -> None:
        """Count a call that runs plainly."""
        self.plain_calls += 1
        self.reasons[reason] += 1

    def totals(self) -> dict[str, Any]:
        """What a run's report says of them, by the names that it has for it."""
        names = ("captures", "replays", "plain_calls", "evictions", "verified")
        words = {"breaks": dict(self.breaks), "plain_reasons": dict(self.reasons)}
        return {name: getattr(self, name) for name in names} | words

    def __str__(self) -> str:
        text = (
            f"Graphs: {self.traces} traced in {self.trace_seconds:.1f} s, {self.captures} captured,"
            f" {self.replays} replays, {_calls(self.plain_calls)} without a graph."
        )
        for reason, times in self.reasons.most_common(3):
            text += f" {_calls(times)}: {reason}."
        for reason in list(self.breaks)[:3]:
            text += f" The step is cut into graphs there: {reason}."
        if self.evictions:
            text += f" {self.evictions} graphs were dropped for newer ones: raise `max_graphs`, or use fewer shapes."
        return text


def _calls(number: int) -> str:
    return f"{number} call{'' if number == 1 else 's'}"
