"""What the graphs of a run did, in numbers."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class GraphCounts:
    """What the graphs of a run did."""

    traces: int = 0
    """FX graphs that TorchDynamo traced."""
    trace_seconds: float = 0.0
    """Time that tracing took, of the main thread."""
    captures: int = 0
    """Graphs captured, or programs compiled, one per shape."""
    replays: int = 0
    padded: int = 0
    """Replays with rows added to fill a larger graph's batch."""
    plain_calls: int = 0
    """Calls of a step, a network or a traced part of one that ran plainly."""
    verified: int = 0
    """Replays, captures among them, that were compared with the plain ops."""
    evictions: int = 0
    """Graphs dropped for newer ones."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why calls ran plainly: a reason in words, and how many calls it concerned."""

    def plain(self, reason: str) -> None:
        """Count a call that runs plainly."""
        self.plain_calls += 1
        self.reasons[reason] += 1

    def __str__(self) -> str:
        text = (
            f"Graphs: {self.traces} traced in {self.trace_seconds:.1f} s, {self.captures} captured,"
            f" {self.replays} replays, {self.plain_calls} calls without a graph."
        )
        for reason, times in self.reasons.most_common(3):
            text += f" {times} {'call' if times == 1 else 'calls'}: {reason}."
        if self.evictions:
            text += f" {self.evictions} graphs were dropped for newer ones: raise `max_graphs`, or use fewer shapes."
        return text
