"""Exact simulations of runs of known stage times, and the laws that every report obeys."""

import io

import pytest
from hypothesis import strategies as st
from rich.console import Console

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe.render import render
from lightning_hpu_infer.observe.report import Report, Severity, Verdict
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import Lane, Stage

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
        assert report.efficiency is not None
        assert -1e-9 <= report.efficiency <= 1 + 1e-9
    assert sum(cause.seconds for cause in report.causes) == pytest.approx(idle, abs=1e-9)
    assert all(cause.seconds > 0 and 0 <= cause.share <= 1 + 1e-9 for cause in report.causes)
    assert [c.seconds for c in report.causes] == sorted((c.seconds for c in report.causes), reverse=True)
    for lane in Lane:
        seconds = [time.seconds for time in report.stages if time.lane == lane]
        assert min(seconds, default=0) >= 0
        assert sum(seconds) <= total + 1e-9


_LANES_AND_STAGES = st.sampled_from(
    [
        *((Lane.PREFETCH, stage) for stage in (S.FETCH, S.PREPARE, S.PIN)),
        *((Lane.MAIN, stage) for stage in Stage),
        (Lane.DEVICE, S.DEVICE),
        (Lane.DEVICE, S.DEVICE),
        (Lane.DEVICE, S.COMPILE),
        (Lane.H2D, S.H2D),
        (Lane.D2H, S.D2H),
        (Lane.POSTPROCESS, S.POSTPROCESS),
        (Lane.POSTPROCESS, S.POSTPROCESS),
    ]
)
# A coarse clock, so that spans often touch and coincide.
_MOMENTS = st.integers(0, 40).map(lambda tick: 7e4 + tick / 8) | st.floats(7e4, 7e4 + 5)
random_spans = st.lists(
    st.builds(
        lambda where, a, b, batch: Span(where[1], where[0], min(a, b), max(a, b), batch),
        _LANES_AND_STAGES,
        _MOMENTS,
        _MOMENTS,
        st.none() | st.integers(0, 5),
    ),
    min_size=1,
    max_size=40,
)


LAUNCH = Times({S.FETCH: 0.5, S.LAUNCH: 9, S.DEVICE: 4})
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
        ("`pipelining=True`", "Copy less"),
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


def printed(report: Report) -> str:
    """What a terminal shows of a report."""
    console = Console(file=io.StringIO(), width=200)
    console.print(render(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
