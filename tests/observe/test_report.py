import dataclasses
import io
import json
import random
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from rich.console import Console

from lightning_hpu_infer import HPUInferenceAccelerator
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe import chrome
from lightning_hpu_infer.observe import run as tracing
from lightning_hpu_infer.observe import spans as trace
from lightning_hpu_infer.observe.advice import Setup
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.gaps import device_gaps, timeline
from lightning_hpu_infer.observe.report import Cause, Counters, Report, Severity, Verdict
from lightning_hpu_infer.observe.spans import Lane, Span, Stage
from lightning_hpu_infer.tuning import Depths, DepthTuner
from tests.helpers import Net, predict, rows

OFF = InferenceConfig(hpu_graphs=False, async_copy=False, pipelining=False)
ON = InferenceConfig()
S = Stage


class Times(dict[Stage, float]):
    """Milliseconds per batch of each stage; those not named take nothing."""

    def __missing__(self, stage: Stage) -> float:
        return 0.0


def stock(batches: int, times: Times) -> list[Span]:
    """Stock order: all in the main thread, one after the other; it waits for copies, the result's for the device."""
    spans: list[Span] = []
    now = 100.0
    for batch in range(batches):
        for stage in (S.FETCH, S.PREPARE, S.PIN):
            now = _add(spans, stage, Lane.MAIN, now, times[stage], batch)
        if times[S.H2D]:
            _add(spans, S.H2D, Lane.H2D, now, times[S.H2D], batch)
        now = _add(spans, S.COPY_IN, Lane.MAIN, now, times[S.COPY_IN] + times[S.H2D], batch)
        for stage in (S.START_HOOKS, S.LAUNCH):
            now = _add(spans, stage, Lane.MAIN, now, times[stage], batch)
        done = _add(spans, S.DEVICE, Lane.DEVICE, now, times[S.DEVICE], batch)
        end = done + times[S.COPY_OUT] / 1e3
        spans.append(Span(S.D2H, Lane.D2H, done, end, batch, 1000))
        spans.append(Span(S.WAIT_OUTPUT, Lane.MAIN, now, done, batch))
        spans.append(Span(S.COPY_OUT, Lane.MAIN, done, end, batch))
        now = _add(spans, S.END_HOOKS, Lane.MAIN, end, times[S.END_HOOKS], batch)
    return spans


def pipelined(batches: int, times: Times, in_flight: int = 1, prefetch: int = 2) -> list[Span]:
    """The plugin's order, as an exact simulation: prefetching thread, main thread, copy queues and device."""
    spans: list[Span] = []
    ready: list[float] = []
    taken: list[float] = []
    done: list[float] = []
    thread = main = h2d = device = d2h = 100.0

    def retire(batch: int) -> None:
        nonlocal main, d2h
        if done[batch] > main:
            spans.append(Span(S.WAIT_OUTPUT, Lane.MAIN, main, done[batch], batch))
        start = max(main, done[batch], d2h)
        d2h = _add(spans, S.D2H, Lane.D2H, start, times[S.COPY_OUT], batch)
        spans.append(Span(S.COPY_OUT, Lane.MAIN, max(main, done[batch]), d2h, batch))
        main = _add(spans, S.END_HOOKS, Lane.MAIN, d2h, times[S.END_HOOKS], batch)

    for batch in range(batches):
        if batch >= prefetch:
            thread = max(thread, taken[batch - prefetch])
        for stage in (S.FETCH, S.PREPARE, S.PIN):
            thread = _add(spans, stage, Lane.PREFETCH, thread, times[stage], batch)
        ready.append(thread)
        spans.append(Span(S.WAIT_INPUT, Lane.MAIN, main, max(main, thread), batch))
        main = max(main, thread)
        taken.append(main)
        main = _add(spans, S.COPY_IN, Lane.MAIN, main, times[S.COPY_IN], batch)
        h2d = _add(spans, S.H2D, Lane.H2D, max(main, h2d), times[S.H2D], batch)
        for stage in (S.START_HOOKS, S.LAUNCH):
            main = _add(spans, stage, Lane.MAIN, main, times[stage], batch)
        device = _add(spans, S.DEVICE, Lane.DEVICE, max(main, h2d, device), times[S.DEVICE], batch)
        done.append(device)
        if batch >= in_flight:
            retire(batch - in_flight)
    for batch in range(batches - in_flight, batches):
        retire(batch)
    return spans


def _add(spans: list[Span], stage: Stage, lane: Lane, start: float, ms: float, batch: int) -> float:
    end = start + ms / 1e3
    if ms:
        spans.append(Span(stage, lane, start, end, batch, 1000 if stage in (S.H2D, S.D2H) else 0))
    return end


def check_sums(report: Report) -> None:
    """Laws of every report."""
    total = report.seconds
    idle = total
    if report.device is not None:
        device = report.device
        idle = device.idle + (device.before + device.after if device.mostly_outside else 0)
        assert device.before + device.busy + device.idle + device.after == pytest.approx(total, abs=1e-9)
        assert min(device.before, device.after) >= 0
        assert min(device.busy, device.idle) >= -1e-9
        assert report.idle_share is not None
        assert report.efficiency is not None
        assert -1e-9 <= report.idle_share <= 1 + 1e-9
        assert -1e-9 <= report.efficiency <= 1 + 1e-9
    assert sum(cause.seconds for cause in report.causes) == pytest.approx(idle, abs=1e-9)
    assert all(cause.seconds > 0 and 0 <= cause.share <= 1 + 1e-9 for cause in report.causes)
    assert [c.seconds for c in report.causes] == sorted((c.seconds for c in report.causes), reverse=True)
    for lane in Lane:
        shares = [time.share for time in report.stages if time.lane == lane]
        assert all(0 <= share <= 1 + 1e-9 for share in shares)
        assert sum(shares) <= 1 + 1e-9


lanes_and_stages = st.sampled_from(
    [
        *((Lane.PREFETCH, stage) for stage in (S.FETCH, S.PREPARE, S.PIN)),
        *((Lane.MAIN, stage) for stage in Stage),
        (Lane.DEVICE, S.DEVICE),
        (Lane.DEVICE, S.DEVICE),
        (Lane.DEVICE, S.COMPILE),
        (Lane.H2D, S.H2D),
        (Lane.D2H, S.D2H),
    ]
)
# A coarse clock, so that spans often touch and coincide.
moments = st.integers(0, 40).map(lambda tick: 7e4 + tick / 8) | st.floats(7e4, 7e4 + 5)
random_spans = st.lists(
    st.builds(
        lambda where, a, b, batch: Span(where[1], where[0], min(a, b), max(a, b), batch),
        lanes_and_stages,
        moments,
        moments,
        st.none() | st.integers(0, 5),
    ),
    min_size=1,
    max_size=40,
)


@given(random_spans, st.sampled_from([None, ON, OFF]))
def test_shares_and_causes_add_up_whatever_the_spans(spans: list[Span], config: InferenceConfig | None) -> None:
    report = analyse(spans, config=config)
    check_sums(report)
    assert report.advice
    assert Report.from_json(report.to_json()) == report


@given(random_spans)
def test_the_order_of_spans_does_not_matter(spans: list[Span]) -> None:
    shuffled = random.Random(0).sample(spans, len(spans))
    one, other = analyse(spans), analyse(shuffled)
    assert one.device == other.device
    assert {c.stage: pytest.approx(c.seconds, abs=1e-9) for c in one.causes if c.stage is None} == {
        c.stage: c.seconds for c in other.causes if c.stage is None
    }


@given(random_spans)
def test_gaps_are_where_no_program_ran(spans: list[Span]) -> None:
    programs = [span for span in spans if span.lane == Lane.DEVICE and span.stage == S.DEVICE]
    idle = 0.0
    for gap in device_gaps(spans):
        for start, end, _ in gap:
            assert start < end
            assert not any(span.start < end and start < span.end for span in programs)
            idle += end - start
        assert all(left[1] == right[0] for left, right in pairwise(gap))
    device = analyse(spans).device
    assert idle == pytest.approx(device.before + device.idle + device.after if device else analyse(spans).seconds)


def test_the_innermost_stage_counts() -> None:
    launch, replay = Span(S.LAUNCH, Lane.MAIN, 0, 10), Span(S.REPLAY, Lane.MAIN, 2, 5)
    same_start = Span(S.CAPTURE, Lane.MAIN, 0, 1)
    assert timeline([launch, replay, same_start]) == [
        (0, 1, S.CAPTURE),
        (1, 2, S.LAUNCH),
        (2, 5, S.REPLAY),
        (5, 10, S.LAUNCH),
    ]


CASES = {
    "slow fetch": (
        Times({S.FETCH: 12, S.LAUNCH: 1, S.DEVICE: 4, S.COPY_OUT: 0.2}),
        (Verdict.INPUT, Severity.HIGH, S.FETCH),
        ("`pipelining=True`", "`num_workers`"),
    ),
    "slow prepare": (
        Times({S.FETCH: 1, S.PREPARE: 9, S.LAUNCH: 1, S.DEVICE: 4}),
        (Verdict.INPUT, Severity.HIGH, S.PREPARE),
        ("`pipelining=True`", "`on_before_batch_transfer`"),
    ),
    "slow pinning": (
        Times({S.FETCH: 1, S.PIN: 9, S.LAUNCH: 1, S.DEVICE: 4}),
        (Verdict.INPUT, Severity.HIGH, S.PIN),
        ("`pipelining=True`", "pinned memory"),
    ),
    "slow copy in": (
        Times({S.FETCH: 1, S.H2D: 8, S.LAUNCH: 1, S.DEVICE: 4}),
        (Verdict.INPUT, Severity.HIGH, S.H2D),
        ("`async_copy=True`", "Copy less"),
    ),
    "slow transfer hooks": (
        Times({S.FETCH: 1, S.COPY_IN: 8, S.H2D: 0.5, S.LAUNCH: 1, S.DEVICE: 4}),
        (Verdict.INPUT, Severity.HIGH, S.COPY_IN),
        ("`pipelining=True`", "`on_after_batch_transfer` cheaper"),
    ),
    "slow launch": (
        Times({S.FETCH: 0.5, S.LAUNCH: 9, S.DEVICE: 4}),
        (Verdict.LAUNCH, Severity.HIGH, S.LAUNCH),
        ("`hpu_graphs=True`", "larger batches"),
    ),
    "slow start hooks": (
        Times({S.FETCH: 0.5, S.START_HOOKS: 8, S.LAUNCH: 1, S.DEVICE: 4}),
        (Verdict.LAUNCH, Severity.HIGH, S.START_HOOKS),
        ("`pipelining=True`", "`on_predict_batch_start`"),
    ),
    "slow copy out": (
        Times({S.FETCH: 0.5, S.LAUNCH: 0.5, S.DEVICE: 4, S.COPY_OUT: 9}),
        (Verdict.OUTPUT, Severity.HIGH, S.D2H),
        ("`pipelining=True`", "Return less"),
    ),
    "slow end hooks": (
        Times({S.FETCH: 0.5, S.LAUNCH: 0.5, S.DEVICE: 4, S.END_HOOKS: 9}),
        (Verdict.OUTPUT, Severity.HIGH, S.END_HOOKS),
        ("`pipelining=True`", "end hooks cheaper"),
    ),
}


PAIRS = [
    ({S.FETCH: 22, S.END_HOOKS: 15}, (Verdict.INPUT, S.FETCH), "`num_workers`"),
    ({S.FETCH: 22, S.START_HOOKS: 15}, (Verdict.INPUT, S.FETCH), "`num_workers`"),
    ({S.FETCH: 22, S.LAUNCH: 15}, (Verdict.INPUT, S.FETCH), "`num_workers`"),
    ({S.FETCH: 22, S.COPY_OUT: 15}, (Verdict.INPUT, S.FETCH), "`num_workers`"),
    ({S.PREPARE: 22, S.END_HOOKS: 15}, (Verdict.INPUT, S.PREPARE), "`on_before_batch_transfer`"),
    ({S.PIN: 22, S.LAUNCH: 15}, (Verdict.INPUT, S.PIN), "pinned memory"),
    ({S.H2D: 22, S.END_HOOKS: 15}, (Verdict.INPUT, S.H2D), "Copy less"),
    ({S.H2D: 22, S.LAUNCH: 15}, (Verdict.INPUT, S.H2D), "Copy less"),
    ({S.FETCH: 11, S.END_HOOKS: 15}, (Verdict.OUTPUT, S.END_HOOKS), "end hooks cheaper"),
    ({S.FETCH: 11, S.START_HOOKS: 15}, (Verdict.LAUNCH, S.START_HOOKS), "`on_predict_batch_start`"),
    ({S.H2D: 11, S.LAUNCH: 15}, (Verdict.LAUNCH, S.LAUNCH), "larger batches"),
    ({S.LAUNCH: 15, S.END_HOOKS: 8}, (Verdict.LAUNCH, S.LAUNCH), "larger batches"),
    ({S.FETCH: 9.6, S.DEVICE: 10}, (Verdict.DEVICE, None), "precision"),
    ({S.H2D: 9.6, S.DEVICE: 10}, (Verdict.DEVICE, None), "precision"),
]


@pytest.mark.parametrize(("slow", "expected", "advice"), PAIRS)
def test_of_two_slow_stages_the_one_that_sets_the_pace_is_named(
    slow: dict[Stage, float], expected: tuple[Verdict, Stage | None], advice: str
) -> None:
    times = Times({S.LAUNCH: 0.5, S.DEVICE: 4} | slow)
    report = analyse(pipelined(60, times), config=ON)
    check_sums(report)
    verdict, stage = expected
    assert report.verdict == verdict, report.causes
    assert advice in report.advice
    if stage is not None:
        assert report.main_cause is not None
        assert report.main_cause.stage == stage
        assert f"idle mostly for {stage.value}" in report.summary
    # Half of what is named is a gain.
    faster = Times(times | {(stage or S.DEVICE): times[stage or S.DEVICE] / 2})
    assert analyse(pipelined(60, faster)).seconds < 0.96 * report.seconds


@pytest.mark.parametrize("waits_for", [S.WAIT_INPUT, S.WAIT_OUTPUT])
def test_without_a_device_trace_too_a_saturated_thread_sets_the_pace(waits_for: Stage) -> None:
    spans = []
    for k in range(20):
        spans += [
            Span(S.FETCH, Lane.PREFETCH, 22 * k, 22 * k + 21.9, k),
            Span(S.END_HOOKS, Lane.MAIN, 22 * k, 22 * k + 15, k),
            Span(waits_for, Lane.MAIN, 22 * k + 15, 22 * k + 22, k),
        ]
    report = analyse(spans)
    check_sums(report)
    assert report.main_cause is not None
    # Where it waits for the device, that may be busier than anybody has recorded.
    assert report.main_cause.stage == (S.FETCH if waits_for == S.WAIT_INPUT else S.END_HOOKS)


@pytest.mark.parametrize("name", CASES)
def test_each_bottleneck_is_named_before_and_after_the_flags(name: str) -> None:
    times, (verdict, severity, stage), (before, after) = CASES[name]
    for spans, config, advice in ((stock(40, times), OFF, before), (pipelined(40, times), ON, after)):
        report = analyse(spans, config=config)
        check_sums(report)
        assert (report.verdict, report.severity) == (verdict, severity), report.causes
        assert report.main_cause is not None
        # A blocking copy shows on the main thread as copy in or out; where it waits for one, as the copy itself.
        assert report.main_cause.stage in (stage, {S.D2H: S.COPY_OUT, S.H2D: S.COPY_IN}.get(stage))
        assert advice in report.advice
        assert report.batches == 40


def test_a_busy_device_is_the_bound() -> None:
    times = Times({S.FETCH: 2, S.COPY_IN: 0.1, S.LAUNCH: 1, S.DEVICE: 10, S.COPY_OUT: 0.5, S.END_HOOKS: 1})
    spans = pipelined(50, times)
    report = analyse(spans, config=ON)
    check_sums(report)
    assert (report.verdict, report.severity) == (Verdict.DEVICE, Severity.NONE)
    assert report.bound == Lane.DEVICE
    assert report.bound_seconds == pytest.approx(0.5)
    assert report.throughput == pytest.approx(50 / report.seconds)
    assert report.efficiency is not None
    assert report.efficiency > 0.98
    assert "precision" in report.advice
    padded = analyse(spans, config=ON, counters=Counters(padded_elements=100, real_elements=60))
    assert "40% of its input is padding" in padded.advice
    # The very same work in stock order leaves the device idle.
    before = analyse(stock(50, times), config=OFF)
    assert before.verdict == Verdict.INPUT
    assert before.efficiency is not None
    assert before.efficiency < 0.75


def test_causes_are_exact_on_a_case_done_by_hand() -> None:
    spans = [
        Span(S.DEVICE, Lane.DEVICE, 0, 1),
        Span(S.DEVICE, Lane.DEVICE, 11, 12),
        Span(S.WAIT_INPUT, Lane.MAIN, 0.5, 4),
        Span(S.FETCH, Lane.PREFETCH, 0, 3),  # 1 to 3
        Span(S.PREPARE, Lane.PREFETCH, 3, 3.5),
        Span(S.LAUNCH, Lane.MAIN, 5, 8),
        Span(S.REPLAY, Lane.MAIN, 6, 7),
        Span(S.WAIT_OUTPUT, Lane.MAIN, 8, 12),
        Span(S.H2D, Lane.H2D, 8.5, 9),
        Span(S.COMPILE, Lane.DEVICE, 10, 11),
    ]
    assert {cause.stage: cause.seconds for cause in analyse(spans).causes} == {
        S.FETCH: 2,
        S.PREPARE: 0.5,
        S.WAIT_INPUT: 0.5,
        None: 1,
        S.LAUNCH: 2,
        S.REPLAY: 1,
        S.WAIT_OUTPUT: 1.5,
        S.H2D: 0.5,
        S.COMPILE: 1,
    }


@pytest.mark.parametrize(
    ("idle_ms", "severity"), [(0.4, Severity.NONE), (0.6, Severity.MODERATE), (2.6, Severity.HIGH)]
)
def test_severity_follows_the_idle_share(idle_ms: float, severity: Severity) -> None:
    spans = stock(200, Times({S.FETCH: idle_ms, S.DEVICE: 10}))
    report = analyse(spans, config=OFF)
    assert report.severity == severity
    assert report.verdict == (Verdict.DEVICE if severity == Severity.NONE else Verdict.INPUT)


def test_captures_dominate_a_short_run() -> None:
    spans = pipelined(6, Times({S.FETCH: 1, S.LAUNCH: 1, S.DEVICE: 4}))
    shifted = [
        dataclasses.replace(span, start=span.start + 2 * late, end=span.end + 2 * late)
        for span in spans
        for late in [span.batch is not None and span.batch >= 2]
    ]
    capture = min(span.start for span in shifted if span.stage == S.LAUNCH and span.batch == 2)
    shifted.append(Span(S.CAPTURE, Lane.MAIN, capture - 1.9, capture, 2))
    report = analyse(shifted, config=ON, counters=Counters(captures=1, replays=4, plain_calls=1))
    check_sums(report)
    assert (report.verdict, report.severity) == (Verdict.LAUNCH, Severity.HIGH)
    assert report.main_cause is not None
    assert report.main_cause.stage == S.CAPTURE
    assert "1 graphs for 6 batches" in report.advice
    assert "more batches" in report.advice


def test_compilation_is_idle_time_of_its_own() -> None:
    spans = [
        Span(S.DEVICE, Lane.DEVICE, 0, 1, 0),
        Span(S.COMPILE, Lane.DEVICE, 1, 5, 1),
        Span(S.DEVICE, Lane.DEVICE, 5, 6, 1),
        Span(S.WAIT_OUTPUT, Lane.MAIN, 0, 6, 0),
    ]
    report = analyse(spans, config=ON)
    assert report.verdict == Verdict.LAUNCH
    assert report.causes == (Cause(stage=S.COMPILE, seconds=4, share=4 / 6),)
    assert "`bucket_lengths`" in report.advice


LAUNCH = Times({S.FETCH: 0.5, S.LAUNCH: 9, S.DEVICE: 4})


@pytest.mark.parametrize(
    ("times", "config", "counters", "advice"),
    [
        (LAUNCH, ON, Counters(captures=20, replays=20, evictions=4), "`max_graphs` (now 16)"),
        (LAUNCH, ON, Counters(captures=1, replays=20, plain_calls=20), "larger batches"),
        (LAUNCH, ON, Counters(captures=1, replays=20, plain_calls=22, verified=2), "21 of 41 calls"),
        (LAUNCH, ON, Counters(captures=1, replays=20, plain_calls=21, verified=2), "larger batches"),
        (LAUNCH, InferenceConfig(pipelining=False), Counters(), "`pipelining=True`"),
        (LAUNCH, InferenceConfig(in_flight=0), Counters(), "`in_flight=1`"),
        (Times({S.FETCH: 9, S.DEVICE: 4}), InferenceConfig(prefetch=0), Counters(), "`prefetch=2`"),
        (Times({S.FETCH: 9, S.DEVICE: 4}), ON, Counters(), "From 0 workers, go to 3"),
        (Times({S.H2D: 9, S.DEVICE: 4}), ON, Counters(copies=10, pinned_copies=4), "only 4 of 10"),
        (Times({S.COPY_OUT: 9, S.END_HOOKS: 9, S.DEVICE: 4}), ON, Counters(), "`async_output=True`"),
        (Times({S.COPY_OUT: 0.5, S.END_HOOKS: 9, S.DEVICE: 4}), ON, Counters(), "end hooks cheaper"),
        (
            Times({S.COPY_OUT: 9, S.END_HOOKS: 9, S.DEVICE: 4}),
            InferenceConfig(async_output=True),
            Counters(),
            "end hooks cheaper",
        ),
        (
            LAUNCH,
            InferenceConfig(graph_memory=7),
            Counters(captures=9, evictions=4),
            "`max_graphs` (now 16) and `graph_memory` (now 7 bytes)",
        ),
        (Times({S.COPY_OUT: 9, S.DEVICE: 4}), InferenceConfig(in_flight=0), Counters(), "`in_flight=1`"),
        (Times({S.END_HOOKS: 9, S.DEVICE: 4}), InferenceConfig(defer_hooks=False), Counters(), "`defer_hooks=True`"),
    ],
)
def test_advice_names_what_is_not_done_yet(
    times: Times, config: InferenceConfig | None, counters: Counters, advice: str
) -> None:
    in_flight = config.in_flight if config and config.pipelining else 0
    assert advice in analyse(pipelined(40, times, in_flight), config=config, counters=counters).advice


def test_uneven_stages_ask_for_deeper_queues() -> None:
    # The thread works less than the 5 ms of the device per batch, and yet the device waits.
    gap = [Span(S.DEVICE, Lane.DEVICE, k * 6e-3, k * 6e-3 + 5e-3, k) for k in range(40)]
    wait = [Span(S.WAIT_INPUT, Lane.MAIN, k * 6e-3 + 4e-3, k * 6e-3 + 6e-3, k) for k in range(40)]

    def fetching(ms: float) -> list[Span]:
        ends = [(k + 1) * 6e-3 for k in range(40)]
        return [*gap, *wait, *(Span(S.FETCH, Lane.PREFETCH, end - ms / 1e3, end, k) for k, end in enumerate(ends))]

    for ms, deeper in ((3, True), (4.9, True), (5.1, False)):
        assert ("Raise `prefetch` from 2 to 4" in analyse(fetching(ms), config=ON).advice) is deeper
    assert "from 600 to 1024" in analyse(fetching(3), config=InferenceConfig(prefetch=600)).advice
    hooks = [Span(S.END_HOOKS, Lane.MAIN, k * 6e-3 + 4e-3, k * 6e-3 + 6e-3, k) for k in range(40)]
    assert "Raise `in_flight` from 1 to 2" in analyse(gap + hooks, config=ON).advice
    # Not where it was tried, or may not be.
    for config in (InferenceConfig(pipelining="auto"), InferenceConfig(prefetch=1024, in_flight=1024)):
        assert "`num_workers`" in analyse(fetching(3), config=config).advice
        assert "end hooks cheaper" in analyse(gap + hooks, config=config).advice


@pytest.mark.parametrize(
    ("stage", "measured_on", "verdict"),
    [
        (S.WAIT_INPUT, "", Verdict.INPUT),
        (S.FETCH, "", Verdict.INPUT),
        (S.WAIT_OUTPUT, "", Verdict.DEVICE),
        (S.LAUNCH, "", Verdict.LAUNCH),
        (S.LAUNCH, "cpu", Verdict.DEVICE),
        (S.CAPTURE, "", Verdict.LAUNCH),
        (S.END_HOOKS, "", Verdict.OUTPUT),
    ],
)
def test_without_a_device_trace_the_host_is_judged(stage: Stage, measured_on: str, verdict: Verdict) -> None:
    spans = [Span(stage, Lane.MAIN, k, k + 0.7, k) for k in range(10)]
    report = analyse(spans, measured_on=measured_on)
    check_sums(report)
    assert report.verdict == verdict
    assert (report.device, report.efficiency, report.idle_share) == (None, None, None)
    assert "judged by the host alone" in report.summary
    assert "No program of a device is in the trace" in printed(report)


def test_waiting_for_input_is_explained_by_the_prefetching_thread() -> None:
    spans = [Span(S.WAIT_INPUT, Lane.MAIN, 0, 10), Span(S.PREPARE, Lane.PREFETCH, 0, 8)]
    report = analyse(spans)
    assert [(cause.stage, cause.seconds) for cause in report.causes] == [(S.PREPARE, 8), (S.WAIT_INPUT, 2)]


def test_a_slow_start_comes_before_all_else() -> None:
    # What follows the start would be output-bound.
    late = [
        dataclasses.replace(span, start=span.start + 3, end=span.end + 3)
        for span in pipelined(40, Times({S.LAUNCH: 1, S.DEVICE: 4, S.END_HOOKS: 8}))
    ]
    start = min(span.start for span in late)
    for stage, lane, verdict in (
        (S.FETCH, Lane.MAIN, Verdict.INPUT),
        (S.FETCH, Lane.PREFETCH, Verdict.INPUT),
        (S.LAUNCH, Lane.MAIN, Verdict.LAUNCH),
    ):
        waits = [Span(S.WAIT_INPUT, Lane.MAIN, start - 3, start)] if lane == Lane.PREFETCH else []
        report = analyse([*late, *waits, Span(stage, lane, start - 3, start, 0)], config=OFF)
        check_sums(report)
        assert (report.verdict, report.severity) == (verdict, Severity.HIGH)
        assert f"idle mostly for {stage.value}" in report.summary
        assert "3 s of 3.36 s passed before the device's first program" in report.advice
        assert f"above all for {stage.value}." in report.advice


def test_most_of_a_run_may_come_after_the_last_program() -> None:
    spans = [Span(S.DEVICE, Lane.DEVICE, 0, 1, 0), Span(S.END_HOOKS, Lane.MAIN, 1, 3, 0)]
    report = analyse(spans, config=ON)
    assert report.verdict == Verdict.OUTPUT
    assert "end hooks cheaper (2e+03 ms per batch)" in report.advice


@pytest.mark.parametrize(("batches", "plain"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3)])
def test_calls_that_no_graph_could_be_made_for_yet_are_no_fault(batches: int, plain: int) -> None:
    counters = Counters(
        plain_calls=plain, captures=batches > 2, verified=max(0, min(batches - 2, 2)), replays=max(0, batches - 3)
    )
    report = analyse(pipelined(batches, LAUNCH), config=ON, counters=counters)
    assert "without a graph" not in report.advice
    hooks = analyse(pipelined(batches, Times({S.START_HOOKS: 9, S.DEVICE: 2})), config=ON, counters=counters)
    assert "without a graph" not in hooks.advice


def test_efficiency_is_of_the_whole_run() -> None:
    spans = [
        Span(S.LAUNCH, Lane.MAIN, 0, 4, 0),
        Span(S.DEVICE, Lane.DEVICE, 4, 8, 0),
        Span(S.DEVICE, Lane.DEVICE, 9, 10, 1),
    ]
    report = analyse(spans, config=ON)
    assert report.efficiency == 0.5
    assert report.idle_share == pytest.approx(1 / 6)
    assert "device busy 50%" in report.summary
    assert "50% of the device's ceiling" in printed(report)


def test_mostly_is_said_of_the_largest_cause_only() -> None:
    def summary(fetch: float) -> str:
        spans = [
            *(Span(S.DEVICE, Lane.DEVICE, start, start + 10) for start in (0, 30)),
            Span(S.FETCH, Lane.MAIN, 10, 10 + fetch),
            Span(S.LAUNCH, Lane.MAIN, 10 + fetch, 24),
            Span(S.REPLAY, Lane.MAIN, 24, 30),
        ]
        return analyse(spans, config=ON).summary

    assert "launch-bound (high): device busy 50%, idle mostly for launch" in summary(4)
    assert "launch-bound (high): device busy 50%, idle in part for launch" in summary(7.5)


def test_what_is_on_or_has_no_effect_is_not_proposed() -> None:
    fetch, launch = Times({S.FETCH: 9, S.DEVICE: 4}), LAUNCH
    half = analyse(stock(40, fetch), config=InferenceConfig(prefetch=0), setup=Setup(precision="bf16-true"))
    assert "`num_workers`" in half.advice
    for precision, proposed in (("32-true", True), ("bf16-true", False), ("bf16-mixed", False), ("16-mixed", False)):
        busy = analyse(pipelined(40, Times({S.DEVICE: 9})), config=ON, setup=Setup(precision=precision))
        assert ("`precision='bf16-true'`" in busy.advice) is proposed
    for shown in (True, False):
        setup = Setup(progress_bar=shown)
        assert ("`enable_progress_bar=False`" in analyse(pipelined(40, launch), config=ON, setup=setup).advice) is shown
        hooks = analyse(pipelined(40, Times({S.END_HOOKS: 9, S.DEVICE: 4})), config=ON, setup=setup)
        assert ("progress bar" in hooks.advice) is shown


def test_workers_are_no_more_than_cores() -> None:
    slow = pipelined(40, Times({S.FETCH: 89, S.DEVICE: 2}))
    assert "From 0 workers, go to 45" in analyse(slow, config=ON).advice
    report = analyse(slow, config=ON, setup=Setup(cores=6))
    assert (
        "From 0 workers, go to 6; from more, to 6 times as many, but to no more than the machine's 6" in report.advice
    )


ON_THE_HOST = {
    S.FETCH: "`num_workers`",
    S.PREPARE: "`on_before_batch_transfer`",
    S.COPY_IN: "`on_after_batch_transfer` cheaper",
    S.START_HOOKS: "`on_predict_batch_start`",
    S.CAPTURE: "more batches",
    S.LAUNCH: "predict on an HPU",
    S.END_HOOKS: "end hooks cheaper",
}


@pytest.mark.parametrize("config", [ON, OFF, InferenceConfig(prefetch=0), InferenceConfig(in_flight=0)])
@pytest.mark.parametrize("stage", ON_THE_HOST)
def test_on_the_cpu_no_flag_is_proposed(stage: Stage, config: InferenceConfig) -> None:
    spans = [Span(stage, Lane.MAIN, k, k + 0.7, k) for k in range(10)]
    report = analyse(spans, config=config, measured_on="cpu")
    assert ON_THE_HOST[stage] in report.advice
    assert "=True" not in report.advice
    assert "`prefetch" not in report.advice


@pytest.mark.parametrize("name", CASES)
def test_no_flag_of_ours_is_proposed_to_a_run_of_another_program(name: str) -> None:
    for spans in (stock(40, CASES[name][0]), pipelined(40, CASES[name][0])):
        advice = analyse(spans, measured_on="NVIDIA A100").advice
        for flag in ("=True", "prefetch", "in_flight", "`bucket_lengths`", "`max_graphs`"):
            assert flag not in advice
    between = [Span(S.DEVICE, Lane.DEVICE, k, k + 0.5, k) for k in range(9)]
    launched = [Span(S.LAUNCH, Lane.MAIN, k - 0.5, k, k) for k in range(9)]
    assert "graph" not in analyse(between).advice
    assert "as a graph (on a Gaudi" in analyse(between + launched).advice


def test_copies_have_a_bandwidth() -> None:
    spans = [
        Span(S.H2D, Lane.H2D, 0, 1, 0, nbytes=10**9),
        Span(S.H2D, Lane.H2D, 0.5, 2, 1, nbytes=10**9),
        Span(S.D2H, Lane.D2H, 0, 0, 1, nbytes=5),
    ]
    copies = analyse(spans).copies
    assert [(copy.lane, copy.nbytes, copy.seconds, copy.bandwidth) for copy in copies] == [
        (Lane.H2D, 2 * 10**9, 2, 1e9),
        (Lane.D2H, 5, 0, 0),
    ]


def test_nothing_to_analyse_is_an_error() -> None:
    with pytest.raises(ValueError, match="no span was recorded"):
        analyse([])


def test_json_is_plain_and_complete() -> None:
    report = analyse(stock(5, LAUNCH), config=OFF, counters=Counters(captures=3), measured_on="emulated HPU")
    text = report.to_json()
    data = json.loads(text)
    assert data["verdict"] == "launch-bound"
    assert data["counters"]["captures"] == 3
    assert data["efficiency"] == report.efficiency
    assert data["causes"][0]["stage"] == "launch"
    assert json.loads(json.dumps(report.as_dict())) == data
    assert Report.from_json(text) == report
    with pytest.raises(KeyError):
        Report.from_json("{}")


def test_it_prints_itself() -> None:
    report = analyse(
        pipelined(40, Times({S.FETCH: 12, S.H2D: 1, S.LAUNCH: 1, S.DEVICE: 4, S.COPY_OUT: 1})),
        config=ON,
        counters=Counters(captures=1, replays=37, padded_elements=4, real_elements=3, copies=9, pinned_copies=8),
        measured_on="emulated HPU",
    )
    text = printed(report)
    for part in (
        "input-bound (high)",
        "40 batches",
        "of the device's ceiling",
        "measured on emulated HPU",
        "1 captures, 37 replays",
        "25% of the inputs",
        "8 of 9",
        "GB/s",
        "busiest: prefetch thread, 12 ms per batch",
        "Next: Raise `num_workers`",
    ):
        assert part in text, part


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.usefixtures("emulated")
def test_of_a_long_run_the_part_that_all_threads_kept_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = HPUInferenceAccelerator(trace=tmp_path)
    predict(whole, Net(), rows(200, 2))
    monkeypatch.setattr(trace, "deque", lambda maxlen: deque(maxlen=150))
    long = HPUInferenceAccelerator(trace=tmp_path)
    predict(long, Net(), rows(200, 2))
    assert whole.report is not None
    assert long.report is not None
    assert (whole.report.truncated, whole.report.batches) == (False, 100)
    assert long.report.truncated
    assert 10 < long.report.batches < 40
    spans, _ = chrome.read(tmp_path / "trace.json")
    # The thread made fewer spans per batch, and so has kept older batches than the main thread.
    begins = [min(span.start for span in spans if span.lane == lane) for lane in Lane]
    assert max(begins) - min(begins) < 0.2 * long.report.seconds
    assert "Only this last part of the run was recorded" in printed(long.report)
    assert "Only this last part" not in printed(whole.report)
    assert Report.from_json(long.report.to_json()) == long.report


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("flags", "options", "prefetch", "in_flight"),
    [
        ({}, {}, 2, 1),
        ({"prefetch": 3, "in_flight": 2}, {}, 3, 2),
        ({"pipelining": False}, {}, 0, 1),
        ({"pipelining": "auto"}, {}, 2, 1),
        ({}, {"precision": "bf16-true"}, 0, 1),
    ],
)
def test_advice_rests_on_what_really_ran(
    flags: dict[str, Any],
    options: dict[str, Any],
    prefetch: int,
    in_flight: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked: list[tuple[InferenceConfig, Setup]] = []

    def analysed(spans: list[Span], *, config: InferenceConfig, setup: Setup, **others: Any) -> Report:
        asked.append((config, setup))
        return analyse(spans, config=config, setup=setup, **others)

    monkeypatch.setattr(tracing, "analyse", analysed)
    predict(HPUInferenceAccelerator(trace=tmp_path, **flags), Net(), rows(12, 2), **options)
    ((config, setup),) = asked
    assert (config.prefetch, config.in_flight) == (prefetch, in_flight)
    assert setup.precision == options.get("precision", "32-true")
    assert setup.may_prefetch is ("precision" not in options)
    assert not setup.progress_bar
    assert setup.cores >= 1


def test_advice_rests_on_the_depths_that_a_run_ended_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[InferenceConfig] = []
    monkeypatch.setattr(tracing, "analyse", lambda spans, config, **_: asked.append(config))
    traced = tracing.TracedRun(InferenceConfig(pipelining="auto"), Trainer(accelerator="cpu", logger=False))
    traced.trace.prefetch.timed(S.FETCH, int)
    traced.trace.main.batch = 0
    traced.trace.main.timed(S.LAUNCH, int)
    traced.finish(Counters(), DepthTuner(Depths(8, 3), budget=1))
    assert (asked[0].prefetch, asked[0].in_flight) == (8, 3)


def test_the_name_of_a_foreign_device_is_no_markup() -> None:
    report = analyse(stock(4, Times({S.DEVICE: 5})), measured_on="[/x]")
    assert "measured on [/x]" in printed(report)
