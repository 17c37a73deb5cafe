"""The picture of a trace."""

import re
import sys
from pathlib import Path

import pytest

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe import timeline as plots
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import Lane, Stage
from tests.observe.simulate import Times, pipelined, stock

TIMES = Times(
    {
        Stage.FETCH: 3,
        Stage.PREPARE: 1,
        Stage.COPY_IN: 0.7,
        Stage.H2D: 1,
        Stage.LAUNCH: 2,
        Stage.DEVICE: 4,
        Stage.COPY_OUT: 0.8,
        Stage.END_HOOKS: 1.2,
    }
)


def svg(path: Path) -> str:
    """Text stays text in an SVG, in comments at least."""
    return path.read_text()


def test_png_and_svg_by_suffix(tmp_path: Path) -> None:
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        path = tmp_path / f"run{suffix}"
        plots.timeline(pipelined(10, TIMES), path)
        assert path.read_bytes().startswith(magic)
    with pytest.raises(ValueError, match="bmp2"):
        plots.timeline(pipelined(10, TIMES), tmp_path / "run.bmp2")


def test_what_is_written_in_the_picture(tmp_path: Path) -> None:
    spans = stock(40, TIMES)
    report = analyse(spans, config=InferenceConfig(pipelining=False))
    plots.timeline(spans, tmp_path / "run.svg", title=report.summary)
    text = svg(tmp_path / "run.svg")
    for part in (
        report.summary,
        "batches 17 to 22 of 0 to 39",
        "main thread",
        "device",
        "copy to host",
        "one colour and number per batch",
        "hatched: device idle, here for fetch 18.0 ms, launch 12.0 ms, copy in 10.2 ms",
    ):
        assert f"<!-- {part} -->" in text or part in text, part
    assert "prefetch thread" not in text


def test_the_window_is_what_was_asked_for(tmp_path: Path) -> None:
    spans = pipelined(10, TIMES)
    for first, shown in ((None, "batches 2 to 7 of 0 to 9"), (0, "batches 0 to 5 of 0 to 9"), (7, "batches 7 to 9 of")):
        plots.timeline(spans, tmp_path / "run.svg", first=first)
        assert shown in svg(tmp_path / "run.svg")
    with pytest.raises(ValueError, match="no batch 10 in the trace, which has 10 batches"):
        plots.timeline(spans, tmp_path / "run.svg", first=10)


@pytest.mark.parametrize(
    "spans",
    [
        [Span(Stage.LAUNCH, Lane.MAIN, 1, 1)],
        [Span(Stage.LAUNCH, Lane.MAIN, 1, 1, 0), Span(Stage.DEVICE, Lane.DEVICE, 1, 1, 0)],
        [Span(Stage.DEVICE, Lane.DEVICE, k, k + 0.4) for k in range(900)],
        [Span(Stage.FETCH, Lane.PREFETCH, 0, 1, 0)],
        [Span(Stage.WAIT_OUTPUT, Lane.MAIN, 0, 3600, 0), Span(Stage.COMPILE, Lane.DEVICE, 1, 2, 0)],
    ],
    ids=["empty", "empty with device", "no batches", "prefetching only", "an hour"],
)
def test_odd_traces_can_be_drawn(tmp_path: Path, spans: list[Span]) -> None:
    plots.timeline(spans, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_many_short_idle_times_are_summed_up(tmp_path: Path) -> None:
    spans = [
        *(Span(Stage.DEVICE, Lane.DEVICE, k / 1e3, (k + 0.5) / 1e3, k // 100) for k in range(1000)),
        Span(Stage.LAUNCH, Lane.MAIN, 0, 1, 0),
    ]
    plots.timeline(spans, tmp_path / "run.svg", first=0)
    assert "hatched: device idle, here for launch 500.0 ms" in svg(tmp_path / "run.svg")


def places(text: str) -> dict[str, tuple[float, float]]:
    """Where words are written, in points from the top left."""
    found = re.findall(r"<!-- ([^\n]*) -->\s*<g (?:style=[^>]*?)?transform=\"translate\(([\d.]+) ([\d.]+)\)", text)
    return {words: (float(x), float(y)) for words, x, y in found}


def test_all_idle_time_of_the_device_is_drawn_and_named(tmp_path: Path) -> None:
    """Before its first program and after its last, too."""
    spans = [
        Span(Stage.FETCH, Lane.MAIN, 0, 4, 0),
        Span(Stage.DEVICE, Lane.DEVICE, 4, 6, 0),
        Span(Stage.END_HOOKS, Lane.MAIN, 6, 9, 0),
    ]
    plots.timeline(spans, tmp_path / "run.svg")
    found = places(svg(tmp_path / "run.svg"))
    assert found["fetch 4.0 s"][0] < found["end hooks 3.0 s"][0]


def test_without_a_device_there_is_no_idle_time(tmp_path: Path) -> None:
    plots.timeline([Span(Stage.FETCH, Lane.MAIN, 0, 4, 0)], tmp_path / "run.svg")
    assert "idle" not in svg(tmp_path / "run.svg")


def test_compilation_is_drawn_as_idle_time(tmp_path: Path) -> None:
    spans = [
        Span(Stage.DEVICE, Lane.DEVICE, 0, 3, 0),
        Span(Stage.COMPILE, Lane.DEVICE, 3, 7, 1),
        Span(Stage.DEVICE, Lane.DEVICE, 7, 10, 1),
    ]
    plots.timeline(spans, tmp_path / "run.svg")
    assert "compile 4.0 s" in places(svg(tmp_path / "run.svg"))


def test_a_stage_inside_of_another_has_a_row_below(tmp_path: Path) -> None:
    spans = [
        Span(Stage.LAUNCH, Lane.MAIN, 0, 4, 0),
        Span(Stage.REPLAY, Lane.MAIN, 0, 4, 0),
        Span(Stage.END_HOOKS, Lane.MAIN, 4, 8, 0),
    ]
    plots.timeline(spans, tmp_path / "run.svg")
    found = places(svg(tmp_path / "run.svg"))
    assert found["launch 0"][1] == found["end hooks 0"][1] < found["replay 0"][1] - 20


def test_workers_at_once_have_a_row_each(tmp_path: Path) -> None:
    starts = [(0.0, 4.0), (1.0, 5.0), (4.0, 8.0), (5.0, 9.0)]
    spans = [Span(Stage.POSTPROCESS, Lane.POSTPROCESS, *ends, batch) for batch, ends in enumerate(starts)]
    plots.timeline(spans, tmp_path / "run.svg")
    found = places(svg(tmp_path / "run.svg"))
    assert "post-processing" in found
    assert found["0"][1] == found["2"][1] < found["1"][1] - 20
    assert found["1"][1] == found["3"][1]


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no span was recorded"):
        plots.timeline([], tmp_path / "run.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install lightning-hpu-infer\[plots\]"):
        plots.timeline(pipelined(3, TIMES), tmp_path / "run.png")


def test_pyplot_keeps_no_figure(tmp_path: Path) -> None:
    from matplotlib import pyplot

    plots.timeline(pipelined(3, TIMES), tmp_path / "run.png")
    assert pyplot.get_fignums() == []
