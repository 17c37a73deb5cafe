"""Spans: what each stage of each batch took, recorded by an observer."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from time import perf_counter
from typing import Any, TypeVar

from lightning_hpu_infer.observer import Lane, Observer, Stage

T = TypeVar("T")

HOST_LANES = (Lane.PREFETCH, Lane.MAIN, Lane.WRITER, Lane.POSTPROCESS)


@dataclass(frozen=True, slots=True)
class Span:
    """One stage of one batch."""

    stage: Stage
    lane: Lane
    start: float
    """Seconds on the clock of `time.perf_counter`."""
    end: float
    batch: int | None = None
    """Index of the batch in the run, over all dataloaders, from 0; None where it belongs to no single batch."""
    nbytes: int = 0
    """Bytes that were copied."""

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.end - self.start


def in_rows(spans: Iterable[Span]) -> Iterator[tuple[Span, int]]:
    """The spans by their starts, each with the first row of its lane that has room for it, from 0."""
    ends: dict[Lane, list[float]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        rows = ends[span.lane]
        # Times read from a file are inexact.
        row = next((row for row, end in enumerate(rows) if end <= span.start + 5e-9), len(rows) if span.seconds else 0)
        rows[row : row + 1] = [max([span.end, *rows[row : row + 1]])]
        yield span, row


class Trace(Observer):
    """Records the spans of the host's lanes: the newest half million of each."""

    records = True

    def __init__(self) -> None:
        # Tuples of little else than numbers: they are made, and kept, beside every batch.
        self._records: dict[Lane, deque[tuple[Stage, float, float, int | None]]] = {
            lane: deque(maxlen=500_000) for lane in HOST_LANES
        }
        self._batch: dict[Lane, int | None] = dict.fromkeys(self._records)

    def wrap(self, stage: Stage, function: Callable[..., T], lane: Lane = Lane.MAIN) -> Callable[..., T]:
        """`function`, with a span around each call."""
        return partial(self._recorded, lane, stage, function)

    def timed(self, stage: Stage, function: Callable[..., T], *args: Any) -> T:
        """Call `function` within a span."""
        return self._recorded(Lane.MAIN, stage, function, *args)

    def at(self, batch: int | None, lane: Lane = Lane.MAIN) -> None:
        """Attribute the spans that end from now on in this lane to a batch."""
        self._batch[lane] = batch

    def add(self, stage: Stage, lane: Lane, start: float, end: float, batch: int | None) -> None:
        """Record a span that was measured elsewhere."""
        self._records[lane].append((stage, start, end, batch))

    def _recorded(self, lane: Lane, stage: Stage, function: Callable[..., T], *args: Any) -> T:
        start = perf_counter()
        try:
            return function(*args)
        finally:
            self._records[lane].append((stage, start, perf_counter(), self._batch[lane]))

    @property
    def complete_from(self) -> float:
        """From when on every lane is complete, as old spans make room for new ones; minus infinity if none did.

        Seconds on the clock of `time.perf_counter`.
        """
        full = (records[0][2] for records in self._records.values() if len(records) == records.maxlen)
        return max(full, default=-inf)

    def spans(self) -> list[Span]:
        """What was recorded, lane by lane, in the order in which it ended."""
        return [
            Span(stage, lane, start, end, batch)
            for lane, records in self._records.items()
            for stage, start, end, batch in records
        ]
