"""From the spans of a run to its report: what the device waited for, and what that makes the limit."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe.advice import Setup, advise
from lightning_hpu_infer.observe.gaps import LaneTimes
from lightning_hpu_infer.observe.report import Cause, Counters, DeviceTime, Report, Severity, StageTime, Verdict
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import WAITS, Lane, Stage

# Shares of the device's time from which a limit is moderate, and high: those of TensorFlow's profiler.
_THRESHOLDS = {Verdict.INPUT: (0.05, 0.20), Verdict.LAUNCH: (0.03, 0.15), Verdict.OUTPUT: (0.05, 0.20)}
_INPUT = (Stage.FETCH, Stage.PREPARE, Stage.PIN, Stage.WAIT_INPUT, Stage.COPY_IN, Stage.H2D)
_OUTPUT = {Stage.WAIT_OUTPUT, Stage.COPY_OUT, Stage.END_HOOKS, Stage.D2H, Stage.POSTPROCESS, Stage.WRITE, *WAITS[2:]}


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
        config: The flags, with the depths that the run ended with; the advice leaves out what is on already. None is a
            run of another program, to which no flag is proposed.
        setup: What else the advice depends on. Unknown by default.
        counters: What the spans do not show. All zero by default.
        measured_on: Name of the device, such as "emulated HPU". On "cpu" the launch is the computation.
        tuning: What `pipelining="auto"` did.
        truncated: Whether the spans are only the last part of the run.

    Raises:
        ValueError: If there are no spans.
    """
    if not spans:
        raise ValueError("There is nothing to analyse: no span was recorded. Trace a run of at least one batch.")
    times = LaneTimes(spans)
    device = None
    if times.has_programs:
        busy = math.fsum(seconds for state, seconds in times.inside.items() if state.computing)
        before, between, after = times.first - times.start, times.last - times.first, times.end - times.last
        device = DeviceTime(before=before, busy=busy, idle=between - busy, after=after)
    causes = _causes(times, device, measured_on)
    verdict, severity = _judge(causes, on_host=device is None)
    launched = {span.batch for span in spans if span.stage == Stage.LAUNCH} - {None}
    report = Report(
        verdict=verdict,
        severity=severity,
        advice="",
        measured_on=measured_on,
        batches=len(launched or {span.batch for span in spans} - {None}),
        seconds=times.end - times.start,
        stages=_stage_times(spans, times),
        device=device,
        causes=causes,
        counters=counters or Counters(),
        tuning=tuple(tuning),
        truncated=truncated,
    )
    return replace(report, advice=advise(report, config, setup or Setup()))


def _stage_times(spans: Sequence[Span], times: LaneTimes) -> tuple[StageTime, ...]:
    seconds: dict[tuple[Lane, Stage | None], float] = defaultdict(float)
    for state, duration in (*times.inside.items(), *times.outside.items()):
        for place in zip(Lane, state, strict=True):
            seconds[place] += duration
    sizes: dict[tuple[Lane, Stage], list[int]] = defaultdict(list)
    for span in spans:
        sizes[span.lane, span.stage].append(span.nbytes)
    places = [(lane, stage) for lane in Lane for stage in Stage if (lane, stage) in sizes]
    return tuple(
        StageTime(lane=at[0], stage=at[1], seconds=seconds[at], spans=len(sizes[at]), nbytes=sum(sizes[at]))
        for at in places
    )


def _causes(times: LaneTimes, device: DeviceTime | None, measured_on: str) -> tuple[Cause, ...]:
    """The device's idle time by cause, largest first."""
    states, base = list(times.inside.items()), times.last - times.first
    if device is None or device.mostly_outside:
        states, base = [*states, *times.outside.items()], times.end - times.start
    totals: dict[Stage | None, float] = defaultdict(float)
    for state, seconds in states:
        if not state.computing:
            totals[state.cause(times.pace)] += seconds
    verdicts = {stage: _verdict_of(stage, on_host=device is None, on_cpu=measured_on == "cpu") for stage in totals}
    return tuple(
        Cause(stage=stage, verdict=verdicts[stage], seconds=seconds, share=seconds / base)
        for stage, seconds in sorted(totals.items(), key=lambda item: -item[1])
    )


def _verdict_of(stage: Stage | None, *, on_host: bool, on_cpu: bool) -> Verdict:
    """What limits a run that mostly waits for this stage; `on_host` if it is the main thread that is in it."""
    if on_host and (stage == Stage.WAIT_OUTPUT or (on_cpu and stage in (Stage.LAUNCH, Stage.REPLAY))):
        return Verdict.DEVICE
    if stage in _INPUT:
        return Verdict.INPUT
    if stage in _OUTPUT:
        return Verdict.OUTPUT
    return Verdict.DEVICE if stage == Stage.DEVICE else Verdict.LAUNCH


def _judge(causes: Sequence[Cause], *, on_host: bool) -> tuple[Verdict, Severity]:
    shares = dict.fromkeys(Verdict, 0.0)
    for cause in causes:
        shares[cause.verdict] += cause.share
    # The main thread is always in something: without a device trace, only what it is in most says anything.
    candidates = sorted(shares if on_host else _THRESHOLDS, key=lambda verdict: -shares[verdict])
    for verdict in candidates[:1] if on_host else candidates:
        moderate, high = _THRESHOLDS.get(verdict, (math.inf, math.inf))
        if shares[verdict] >= moderate:
            return verdict, Severity.HIGH if shares[verdict] >= high else Severity.MODERATE
    return Verdict.DEVICE, Severity.NONE
