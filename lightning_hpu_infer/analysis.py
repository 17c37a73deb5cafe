"""From spans to a report: what the device waited for, and what limits the run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_hpu_infer.advice import advise
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.gaps import Piece, cut_by, device_gaps, host_pieces, programs_of, timeline
from lightning_hpu_infer.report import (
    Cause,
    CopyTime,
    Counters,
    DeviceTime,
    Report,
    Severity,
    StageTime,
    Verdict,
    share_of,
)
from lightning_hpu_infer.trace import Lane, Span, Stage

_THRESHOLDS = {Verdict.INPUT: (0.05, 0.20), Verdict.LAUNCH: (0.03, 0.15), Verdict.OUTPUT: (0.05, 0.20)}
"""Shares of the device's time from which a cause is moderate, and high: those of TensorFlow's profiler."""


def analyse(
    spans: Sequence[Span],
    *,
    config: InferenceConfig | None = None,
    counters: Counters | None = None,
    measured_on: str = "",
    tuning: Sequence[str] = (),
) -> Report:
    """Find out what limits a run.

    Args:
        spans: All spans of the run, in any order.
        config: The flags that were on; the advice leaves out what is on already. None counts as all off.
        counters: What the spans do not show.
        tuning: What `pipelining="auto"` did.
        measured_on: Name of the device, such as "emulated HPU". On "cpu" the launch is the computation.

    Raises:
        ValueError: If there are no spans.
    """
    if not spans:
        raise ValueError("There is nothing to analyse: no span was recorded. Trace a run of at least one batch.")
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    lanes = {lane: timeline(span for span in spans if span.lane == lane) for lane in Lane}
    gaps = device_gaps(spans)
    programs = programs_of(spans)
    device = None
    if programs:
        idle = sum(piece[1] - piece[0] for gap in gaps for piece in gap)
        before, window, after = programs[0][0] - start, programs[-1][1] - programs[0][0], end - programs[-1][1]
        device = DeviceTime(before=before, busy=window - idle, idle=idle, after=after)
        base, pieces = window, [piece for gap in gaps for piece in gap]
    else:
        base, pieces = end - start, host_pieces([(start, end, None)], spans)
    bound, bound_seconds = _bound(lanes, programs)
    report = Report(
        verdict=Verdict.DEVICE,
        severity=Severity.NONE,
        advice="",
        measured_on=measured_on,
        batches=_count_batches(spans),
        seconds=end - start,
        stages=_stage_times(spans, lanes, end - start),
        device=device,
        causes=_causes(pieces, base),
        copies=_copy_times(spans),
        bound=bound,
        bound_seconds=bound_seconds,
        counters=counters or Counters(),
        tuning=tuple(tuning),
    )
    verdict, severity = _judge(report)
    report = replace(report, verdict=verdict, severity=severity)
    return replace(report, advice=advise(report, config))


def _stage_times(spans: Sequence[Span], lanes: Mapping[Lane, list[Piece]], total: float) -> tuple[StageTime, ...]:
    seconds: dict[tuple[Lane, Stage], list[float]] = {}
    spent: dict[tuple[Lane, Stage], int] = {}
    for lane, pieces in lanes.items():
        for start, end, stage in pieces:
            assert stage is not None
            seconds.setdefault((lane, stage), []).append(end - start)
    for span in spans:
        spent[span.lane, span.stage] = spent.get((span.lane, span.stage), 0) + 1
    return tuple(
        StageTime(
            lane=lane,
            stage=stage,
            seconds=(own := math.fsum(seconds.get((lane, stage), ()))),
            share=share_of(own, total),
            spans=spent[lane, stage],
        )
        for lane in Lane
        for stage in Stage
        if (lane, stage) in spent
    )


def _causes(pieces: list[Piece], base: float) -> tuple[Cause, ...]:
    seconds: dict[Stage | None, list[float]] = {}
    for start, end, stage in pieces:
        seconds.setdefault(stage, []).append(end - start)
    totals = {stage: math.fsum(parts) for stage, parts in seconds.items()}
    return tuple(
        Cause(stage=stage, seconds=total, share=share_of(total, base))
        for stage, total in sorted(totals.items(), key=lambda item: -item[1])
        if total > 0
    )


def _copy_times(spans: Sequence[Span]) -> tuple[CopyTime, ...]:
    copies = {lane: [span for span in spans if span.lane == lane] for lane in (Lane.H2D, Lane.D2H)}
    return tuple(
        CopyTime(
            lane=lane,
            nbytes=sum(span.nbytes for span in found),
            seconds=math.fsum(end - start for start, end, _ in timeline(found)),
        )
        for lane, found in copies.items()
        if found
    )


def _bound(lanes: Mapping[Lane, list[Piece]], programs: list[tuple[float, float]]) -> tuple[Lane, float]:
    busy: list[Piece] = [(start, end, Stage.DEVICE) for start, end in programs]
    # A blocking copy of a result waits for the device first.
    main = cut_by(lanes[Lane.MAIN], Stage.COPY_OUT, busy)
    waits = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT, Stage.DEVICE)
    work = {lane: math.fsum(end - start for start, end, _ in pieces) for lane, pieces in lanes.items()}
    work[Lane.MAIN] = math.fsum(end - start for start, end, stage in main if stage not in waits)
    work[Lane.DEVICE] = math.fsum(end - start for start, end in programs)
    return max(work.items(), key=lambda item: item[1])


def _count_batches(spans: Sequence[Span]) -> int:
    launched = {span.batch for span in spans if span.stage == Stage.LAUNCH and span.batch is not None}
    return len(launched or {span.batch for span in spans if span.batch is not None})


def _judge(report: Report) -> tuple[Verdict, Severity]:
    shares = dict.fromkeys(Verdict, 0.0)
    for cause in report.causes:
        shares[report.verdict_of(cause.stage)] += cause.share
    if report.device is None:
        # The main thread is always in something: only what it is in most says anything.
        candidates = [max(shares, key=lambda verdict: shares[verdict])]
    else:
        candidates = sorted(_THRESHOLDS, key=lambda verdict: -shares[verdict])
    for verdict in candidates:
        moderate, high = _THRESHOLDS.get(verdict, (math.inf, math.inf))
        if shares[verdict] >= moderate:
            return verdict, Severity.HIGH if shares[verdict] >= high else Severity.MODERATE
    return Verdict.DEVICE, Severity.NONE
