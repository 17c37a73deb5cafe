import dataclasses
import io
import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_hpu_infer.analysis import analyse
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.gaps import device_gaps, timeline
from lightning_hpu_infer.report import Cause, Counters, Report, Severity, Verdict
from lightning_hpu_infer.trace import Lane, Span, Stage

OFF = InferenceConfig(hpu_graphs=False, async_copy=False, pipelining=False)
ON = InferenceConfig()
S = Stage


class Times(dict[Stage, float]):
    """Milliseconds per batch of each stage; those not named take nothing."""

    def __missing__(self, stage: Stage) -> float:
        return 0.0


def stock(batches: int, times: Times) -> list[Span]:
    """Stock order: all in the main thread, one after the other; the result's copy waits for the device."""
    spans: list[Span] = []
    now = 100.0
    for batch in range(batches):
        for stage in (S.FETCH, S.PREPARE, S.PIN, S.COPY_IN, S.START_HOOKS, S.LAUNCH):
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
        idle = device.idle
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


@settings(deadline=None)  # the machine may be busy
@given(random_spans, st.sampled_from([None, ON, OFF]))
def test_shares_and_causes_add_up_whatever_the_spans(spans: list[Span], config: InferenceConfig | None) -> None:
    report = analyse(spans, config=config)
    check_sums(report)
    assert report.advice
    assert Report.from_json(report.to_json()) == report


@settings(deadline=None)  # the machine may be busy
@given(random_spans)
def test_the_order_of_spans_does_not_matter(spans: list[Span]) -> None:
    shuffled = random.Random(0).sample(spans, len(spans))
    one, other = analyse(spans), analyse(shuffled)
    assert one.device == other.device
    assert {c.stage: pytest.approx(c.seconds, abs=1e-9) for c in one.causes if c.stage is None} == {
        c.stage: c.seconds for c in other.causes if c.stage is None
    }


@settings(deadline=None)  # the machine may be busy
@given(random_spans)
def test_gaps_are_where_no_program_ran(spans: list[Span]) -> None:
    programs = [span for span in spans if span.lane == Lane.DEVICE and span.stage == S.DEVICE]
    for gap in device_gaps(spans):
        for start, end, _ in gap:
            assert start < end
            assert not any(span.start < end and start < span.end for span in programs)
        assert all(left[1] == right[0] for left, right in pairwise(gap))


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
        Times({S.FETCH: 1, S.COPY_IN: 8, S.LAUNCH: 1, S.DEVICE: 4}),
        (Verdict.INPUT, Severity.HIGH, S.COPY_IN),
        ("`async_copy=True`", "Copy less"),
    ),
    "slow launch": (
        Times({S.FETCH: 0.5, S.LAUNCH: 9, S.DEVICE: 4}),
        (Verdict.LAUNCH, Severity.HIGH, S.LAUNCH),
        ("`hpu_graphs=True`", "larger batches"),
    ),
    "slow start hooks": (
        Times({S.FETCH: 0.5, S.START_HOOKS: 8, S.LAUNCH: 1, S.DEVICE: 4}),
        (Verdict.LAUNCH, Severity.HIGH, S.START_HOOKS),
        ("`hpu_graphs=True`", "`on_predict_batch_start`"),
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


@pytest.mark.parametrize("name", CASES)
def test_each_bottleneck_is_named_before_and_after_the_flags(name: str) -> None:
    times, (verdict, severity, stage), (before, after) = CASES[name]
    for spans, config, advice in ((stock(40, times), OFF, before), (pipelined(40, times), ON, after)):
        report = analyse(spans, config=config)
        check_sums(report)
        assert (report.verdict, report.severity) == (verdict, severity), report.causes
        assert report.main_cause is not None
        # A blocking copy shows on the main thread as copy out; where it waits for one, as the copy itself.
        assert report.main_cause.stage in (stage, S.COPY_OUT if stage == S.D2H else stage)
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
        (LAUNCH, ON, Counters(captures=1, replays=2, plain_calls=30), "30 of 32 calls"),
        (LAUNCH, InferenceConfig(pipelining=False), Counters(), "`pipelining=True`"),
        (LAUNCH, InferenceConfig(in_flight=0), Counters(), "`in_flight=1`"),
        (Times({S.FETCH: 9, S.DEVICE: 4}), InferenceConfig(prefetch=0), Counters(), "`prefetch=2`"),
        (Times({S.FETCH: 9, S.DEVICE: 4}), None, Counters(), "`pipelining=True`"),
        (Times({S.FETCH: 9, S.DEVICE: 4}), ON, Counters(), "From 0 workers, go to 3"),
        (Times({S.COPY_IN: 9, S.DEVICE: 4}), ON, Counters(copies=10, pinned_copies=4), "only 4 of 10"),
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
    # The thread works 3 ms per batch and the device 5, and yet it waits.
    gap = [Span(S.DEVICE, Lane.DEVICE, k * 6e-3, k * 6e-3 + 5e-3, k) for k in range(40)]
    fetch = [Span(S.FETCH, Lane.PREFETCH, k * 6e-3 + 3e-3, k * 6e-3 + 6e-3, k) for k in range(40)]
    wait = [Span(S.WAIT_INPUT, Lane.MAIN, k * 6e-3 + 4e-3, k * 6e-3 + 6e-3, k) for k in range(40)]
    assert "Raise `prefetch` from 2 to 4" in analyse(gap + fetch + wait, config=ON).advice
    hooks = [Span(S.END_HOOKS, Lane.MAIN, k * 6e-3 + 4e-3, k * 6e-3 + 6e-3, k) for k in range(40)]
    assert "Raise `in_flight` from 1 to 2" in analyse(gap + hooks, config=ON).advice


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


def test_a_slow_start_is_not_blamed_on_the_device() -> None:
    spans = [Span(S.FETCH, Lane.MAIN, 0, 9, 0), Span(S.DEVICE, Lane.DEVICE, 9, 10, 0)]
    report = analyse(spans, config=ON)
    assert report.verdict == Verdict.DEVICE
    assert report.device is not None
    assert report.device.before == 9
    assert "9 s passed before its first program" in report.advice


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
