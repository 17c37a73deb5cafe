"""The report as a value: shares, summary and JSON."""

import json

import pytest

from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.report import Counters, Report
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import Lane
from tests.observe.simulate import LAUNCH, OFF, ON, S, printed, stock


def test_efficiency_is_of_the_whole_run() -> None:
    spans = [
        Span(S.LAUNCH, Lane.MAIN, 0, 4, 0),
        Span(S.DEVICE, Lane.DEVICE, 4, 8, 0),
        Span(S.DEVICE, Lane.DEVICE, 9, 10, 1),
    ]
    report = analyse(spans, config=ON)
    assert report.efficiency == 0.5
    assert "device busy 50%" in report.summary
    assert "(50% of the run)" in printed(report)


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
