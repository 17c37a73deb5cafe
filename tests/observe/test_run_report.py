"""The report of a run that was recorded."""

from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hpu_infer import HPUInferenceAccelerator
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe import run as tracing
from lightning_hpu_infer.observe import spans as trace
from lightning_hpu_infer.observe.advice import Setup
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.report import Counters, Report
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import Lane, Stage
from tests.helpers import Net, predict, rows
from tests.observe.simulate import S, printed


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
    assert "Only this last part of the run was recorded" in printed(long.report)
    assert "Only this last part" not in printed(whole.report)
    assert Report.from_json(long.report.to_json()) == long.report


def test_what_only_one_thread_kept_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "deque", lambda maxlen: deque(maxlen=6))
    recorded = trace.Trace()
    for batch in range(10):
        recorded.add(Stage.FETCH, Lane.PREFETCH, batch, batch + 0.9, batch)
        for part in (0.0, 0.25, 0.5):
            recorded.add(Stage.LAUNCH, Lane.MAIN, batch + part, batch + part + 0.25, batch)
    kept = {lane: [span.batch for span in recorded.spans() if span.lane == lane] for lane in (Lane.PREFETCH, Lane.MAIN)}
    assert kept == {Lane.PREFETCH: [4, 5, 6, 7, 8, 9], Lane.MAIN: [8, 8, 8, 9, 9, 9]}
    assert recorded.complete_from == 8.25


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("flags", "options", "prefetch", "in_flight"),
    [
        ({}, {}, 2, 1),
        ({"prefetch": 3, "in_flight": 2}, {}, 3, 2),
        ({"pipelining": False}, {}, 0, 0),
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
    traced = tracing.TracedRun(
        InferenceConfig(pipelining="auto"), torch.device("cpu"), lambda: (Counters(), None, ()), lambda _: None
    )
    traced.trace.wrap(S.FETCH, int, Lane.PREFETCH)()
    traced.trace.at(0)
    traced.trace.timed(S.LAUNCH, int)
    traced.finish(Counters(), (8, 3))
    assert (asked[0].prefetch, asked[0].in_flight) == (8, 3)
