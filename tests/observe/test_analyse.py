"""Constructed runs of each bottleneck: verdicts, causes of idle time and stage times."""

import dataclasses
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.gaps import device_gaps, walk
from lightning_hpu_infer.observe.report import Cause, Counters, Report, Severity, Verdict
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import Lane, Stage
from tests.observe.simulate import CASES, OFF, ON, S, Times, check_sums, pipelined, printed, random_spans, stock


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
    parts = [(start, end, state.main) for start, end, state in walk([launch, replay, same_start])]
    assert parts == [
        (0, 1, S.CAPTURE),
        (1, 2, S.LAUNCH),
        (2, 5, S.REPLAY),
        (5, 10, S.LAUNCH),
    ]


PAIRS = [
    ({S.FETCH: 22, S.END_HOOKS: 15}, (Verdict.INPUT, S.FETCH), "`num_workers`"),
    ({S.FETCH: 22, S.START_HOOKS: 15}, (Verdict.INPUT, S.FETCH), "`num_workers`"),
    ({S.FETCH: 22, S.LAUNCH: 15}, (Verdict.INPUT, S.FETCH), "`num_workers`"),
    ({S.FETCH: 22, S.COPY_OUT: 15}, (Verdict.INPUT, S.FETCH), "`num_workers`"),
    ({S.PREPARE: 22, S.END_HOOKS: 15}, (Verdict.INPUT, S.PREPARE), "`on_before_batch_transfer`"),
    ({S.PIN: 22, S.LAUNCH: 15}, (Verdict.INPUT, S.PIN), "Copy less"),
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


@pytest.mark.parametrize("waiting", [True, False])
def test_post_processing_limits_a_run_when_the_main_thread_waits_for_it(waiting: bool) -> None:
    """Not where one of several workers is busy all the time."""
    spans = []
    for k in range(20):
        spans += [
            Span(S.POSTPROCESS, Lane.POSTPROCESS, 10 * k, 10 * k + 9.9, k),
            Span(S.DEVICE, Lane.DEVICE, 10 * k, 10 * k + 3, k),
            Span(S.WAIT_POSTPROCESS if waiting else S.LAUNCH, Lane.MAIN, 10 * k + 2, 10 * k + 10, k),
        ]
    report = analyse(spans, config=ON)
    check_sums(report)
    assert report.verdict == (Verdict.OUTPUT if waiting else Verdict.LAUNCH)
    assert ("Raise `postprocess_workers`" in report.advice) is waiting


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
    assert "captures: 1, batches: 6" in report.advice
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
    assert report.causes == (Cause(stage=S.COMPILE, verdict=Verdict.LAUNCH, seconds=4, share=4 / 6),)
    assert "`bucket_lengths`" in report.advice


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
    assert (report.device, report.efficiency) == (None, None)
    assert "judged by the host alone" in report.summary
    assert "no program of a device" in printed(report)


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
        assert f"mostly spent on {stage.value}." in report.advice


def test_most_of_a_run_may_come_after_the_last_program() -> None:
    spans = [Span(S.DEVICE, Lane.DEVICE, 0, 1, 0), Span(S.END_HOOKS, Lane.MAIN, 1, 3, 0)]
    report = analyse(spans, config=ON)
    assert report.verdict == Verdict.OUTPUT
    assert "end hooks cheaper (2e+03 ms per batch)" in report.advice


def test_copies_have_a_bandwidth() -> None:
    spans = [
        Span(S.H2D, Lane.H2D, 0, 1, 0, nbytes=10**9),
        Span(S.H2D, Lane.H2D, 0.5, 2, 1, nbytes=10**9),
        Span(S.D2H, Lane.D2H, 0, 0, 1, nbytes=5),
    ]
    copies = analyse(spans).stages
    assert [(copy.lane, copy.nbytes, copy.seconds) for copy in copies] == [(Lane.H2D, 2 * 10**9, 2), (Lane.D2H, 5, 0)]
    assert " 1.00 " in printed(analyse(spans))  # GB/s


def test_nothing_to_analyse_is_an_error() -> None:
    with pytest.raises(ValueError, match="no span was recorded"):
        analyse([])
