"""From spans to a report: what the device waited for, and what limits the run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe.advice import Setup, advise
from lightning_hpu_infer.observe.gaps import Piece, device_gaps, lanes_of, programs_of, timeline, work_of
from lightning_hpu_infer.observe.report import (
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
from lightning_hpu_infer.observe.spans import Lane, Span, Stage

_THRESHOLDS = {Verdict.INPUT: (0.05, 0.20), Verdict.LAUNCH: (0.03, 0.15), Verdict.OUTPUT: (0.05, 0.20)}
"""Shares of the device's time from which a cause is moderate, and high: those of TensorFlow's profiler."""


def analyse(
    spans: Sequence[Span],
    *,
    config: InferenceConfig | None = None,
    setup: Setup | None = None,
    counters: Counters | None = None,
    measured_on: str = "",
    tuning: Sequence[str] = (),
    truncated: bool = False,
) -> Report:
    """Find out what limits a run.

    Args:
        spans: All spans of the run, in any order.
        config: The flags as they were on in the end; the advice leaves out what is on already. None is a run of another
            program, to which no flag is proposed.
        setup: What else advice rests on.
        counters: What the spans do not show.
        measured_on: Name of the device, such as "emulated HPU". On "cpu" the launch is the computation.
        tuning: What `pipelining="auto"` did.
        truncated: Whether the spans are only the last part of the run.

    Raises:
        ValueError: If there are no spans.
    """
    if not spans:
        raise ValueError("There is nothing to analyse: no span was recorded. Trace a run of at least one batch.")
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    lanes, programs, gaps = lanes_of(spans), programs_of(spans), device_gaps(spans)
    device, base = None, end - start
    if programs:
        first, last = programs[0][0], programs[-1][1]
        between = [gap for gap in gaps if first <= gap[0][0] and gap[-1][1] <= last]
        idle = sum(gap[-1][1] - gap[0][0] for gap in between)
        device = DeviceTime(before=first - start, busy=last - first - idle, idle=idle, after=end - last)
        if not device.mostly_outside:
            base, gaps = last - first, between
    bound, bound_seconds = max(work_of(lanes, programs, start, end).items(), key=lambda item: item[1])
    report = Report(
        verdict=Verdict.DEVICE,
        severity=Severity.NONE,
        advice="",
        measured_on=measured_on,
        batches=_count_batches(spans),
        seconds=end - start,
        stages=_stage_times(spans, lanes, end - start),
        device=device,
        causes=_causes([piece for gap in gaps for piece in gap], base),
        copies=_copy_times(spans),
        bound=bound,
        bound_seconds=bound_seconds,
        counters=counters or Counters(),
        tuning=tuple(tuning),
        truncated=truncated,
    )
    verdict, severity = _judge(report)
    report = replace(report, verdict=verdict, severity=severity)
    return replace(report, advice=advise(report, config, setup or Setup()))


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
