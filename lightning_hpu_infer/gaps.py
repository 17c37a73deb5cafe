"""Lanes without overlaps, and the gaps in which the device computed nothing, cut by cause."""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import pairwise

from lightning_hpu_infer.trace import Lane, Span, Stage

Piece = tuple[float, float, Stage | None]
"""Start and end in seconds, and what it was spent on; None is host work outside of all stages."""


def device_gaps(spans: Sequence[Span]) -> list[list[Piece]]:
    """The times between its first and its last program when the device computed nothing, each cut by cause.

    A piece belongs to what the main thread was in; where it waited for input, to what the prefetch thread was in; where
    it waited for output, to the copy under way. Compilation comes before all of them.
    """
    gaps: list[Piece] = [(left[1], right[0], None) for left, right in pairwise(programs_of(spans))]
    compiled = cut_by(gaps, None, timeline(span for span in spans if span.stage == Stage.COMPILE))
    pieces = host_pieces(compiled, spans)
    cut: list[list[Piece]] = []
    position = 0
    for _, end, _ in gaps:
        first = position
        while position < len(pieces) and pieces[position][1] <= end:
            position += 1
        cut.append(pieces[first:position])
    return cut


def timeline(spans: Iterable[Span]) -> list[Piece]:
    """One lane without overlaps, in order of time: of stages inside each other, the innermost."""
    waiting = sorted((span for span in spans if span.end > span.start), key=lambda span: span.start)
    pieces: list[Piece] = []
    current: list[tuple[float, float, int]] = []
    begun = 0
    edges = sorted({edge for span in waiting for edge in (span.start, span.end)})
    for left, right in pairwise(edges):
        while begun < len(waiting) and waiting[begun].start <= left:
            # The innermost is the one that began last; of those that began together, the one that ends first.
            heappush(current, (-waiting[begun].start, waiting[begun].end, begun))
            begun += 1
        while current and current[0][1] <= left:
            heappop(current)
        if current:
            pieces.append((left, right, waiting[current[0][2]].stage))
    return pieces


def host_pieces(pieces: list[Piece], spans: Sequence[Span]) -> list[Piece]:
    """Explain those pieces that have no cause yet by what the host was in."""
    main = timeline(span for span in spans if span.lane == Lane.MAIN)
    prefetch = timeline(span for span in spans if span.lane == Lane.PREFETCH)
    copies = timeline(span for span in spans if span.lane in (Lane.H2D, Lane.D2H))
    pieces = cut_by(pieces, None, main)
    pieces = cut_by(pieces, Stage.WAIT_INPUT, prefetch)
    return cut_by(pieces, Stage.WAIT_OUTPUT, copies)


def cut_by(pieces: list[Piece], unclear: Stage | None, lane: list[Piece]) -> list[Piece]:
    """Explain those pieces whose cause is `unclear` by what happened in `lane`, where anything did."""
    explained: list[Piece] = []
    position = 0
    for start, end, cause in pieces:
        if cause is not unclear:
            explained.append((start, end, cause))
            continue
        while position < len(lane) and lane[position][1] <= start:
            position += 1
        done, index = start, position
        while index < len(lane) and lane[index][0] < end:
            left, right = max(lane[index][0], start), min(lane[index][1], end)
            if left > done:
                explained.append((done, left, unclear))
            explained.append((left, right, lane[index][2]))
            done, index = right, index + 1
        if done < end:
            explained.append((done, end, unclear))
    return explained


def programs_of(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """When the device computed: disjoint intervals in order."""
    merged: list[tuple[float, float]] = []
    found = (span for span in spans if span.lane == Lane.DEVICE and span.stage != Stage.COMPILE)
    for start, end in sorted((span.start, span.end) for span in found):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
