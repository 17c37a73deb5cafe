"""Lanes without overlaps, and the gaps in which the device computed nothing, cut by cause."""

import math
from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from itertools import pairwise

from lightning_hpu_infer.observe.spans import Lane, Span, Stage

Piece = tuple[float, float, Stage | None]
"""Start and end in seconds, and what it was spent on; None is host work outside of all stages."""

_SATURATED = 0.9
"""Share of the time from which a lane that works is taken for the one that all others wait for."""


def device_gaps(spans: Sequence[Span]) -> list[list[Piece]]:
    """The times of a run when the device computed nothing, each cut by cause; all of it without any program.

    A piece belongs to what the main thread was in; where it waited for input, to what the prefetch thread was in; where
    it waited for output, to the copy under way. What a saturated lane works on comes before these, since the main
    thread could be as fast as it liked; compilation comes before all of them.
    """
    if not spans:
        return []
    lanes, programs = lanes_of(spans), programs_of(spans)
    edges = [min(span.start for span in spans), max(span.end for span in spans)]
    edges[1:1] = [edge for program in programs for edge in program]
    gaps: list[Piece] = [(left, right, None) for left, right in zip(edges[::2], edges[1::2], strict=True)]
    gaps = [gap for gap in gaps if gap[1] > gap[0]]
    pieces = cut_by(gaps, None, timeline(span for span in spans if span.stage == Stage.COMPILE))
    saturated = _saturated(lanes, programs)
    if saturated is not None:
        pieces = cut_by(pieces, None, lanes[saturated])
    pieces = cut_by(pieces, None, lanes[Lane.MAIN])
    pieces = cut_by(pieces, Stage.WAIT_INPUT, lanes[Lane.PREFETCH])
    copies = timeline(span for span in spans if span.lane in (Lane.H2D, Lane.D2H))
    pieces = cut_by(pieces, Stage.WAIT_OUTPUT, copies)
    cut: list[list[Piece]] = []
    position = 0
    for _, end, _ in gaps:
        first = position
        while position < len(pieces) and pieces[position][1] <= end:
            position += 1
        cut.append(pieces[first:position])
    return cut


def lanes_of(spans: Sequence[Span]) -> dict[Lane, list[Piece]]:
    """Every lane's `timeline`."""
    return {lane: timeline(span for span in spans if span.lane == lane) for lane in Lane}


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


def work_of(
    lanes: Mapping[Lane, list[Piece]], programs: Sequence[tuple[float, float]], start: float, end: float
) -> dict[Lane, float]:
    """Seconds from `start` to `end` that each lane worked, waits left out."""
    # A blocking copy of a result waits for the device first.
    main = cut_by(lanes[Lane.MAIN], Stage.COPY_OUT, [(*program, Stage.WAIT_OUTPUT) for program in programs])
    device: list[Piece] = [(*program, Stage.DEVICE) for program in programs]
    worked = {**lanes, Lane.MAIN: main, Lane.DEVICE: device}
    waits = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT)
    return {
        lane: math.fsum(
            min(right, end) - max(left, start)
            for left, right, stage in pieces
            if stage not in waits and left < end and right > start
        )
        for lane, pieces in worked.items()
    }


def _saturated(lanes: Mapping[Lane, list[Piece]], programs: Sequence[tuple[float, float]]) -> Lane | None:
    """The thread or queue that sets the pace of the others, if one does.

    A lane that has little to do is held up by the others: a full queue lets no thread run ahead.
    """
    if programs:
        start, end = programs[0][0], programs[-1][1]
    elif main := lanes[Lane.MAIN]:
        start, end = main[0][0], main[-1][1]
        waits = {stage: sum(piece[1] - piece[0] for piece in main if piece[2] == stage) for stage in Stage}
        if waits[Stage.WAIT_OUTPUT] >= waits[Stage.WAIT_INPUT]:
            return None  # the device that nobody recorded may do more
    else:
        return None
    work = work_of(lanes, programs, start, end)
    busiest = max(work, key=lambda lane: work[lane])
    return busiest if work[busiest] >= _SATURATED * (end - start) > 0 else None


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
