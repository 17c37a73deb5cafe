import re
import sys
from pathlib import Path

import pytest

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe import timeline as plots
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.spans import Lane, Span, Stage
from tests.observe.test_report import Times, pipelined, stock

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
        "fetch + launch 9.7 ms",
        "one colour and number per batch",
        "L: launch",
    ):
        assert f"<!-- {part} -->" in text or part in text, part
    assert "prefetch thread" not in text


def test_the_window_is_what_was_asked_for(tmp_path: Path) -> None:
    spans = pipelined(10, TIMES)
    for first, last, shown in (
        (None, None, "batches 2 to 7 of 0 to 9"),
        (3, 4, "batches 3 to 4 of 0 to 9"),
        (7, None, "batches 7 to 9 of 0 to 9"),
        (None, 4, "batches 0 to 4 of 0 to 9"),
        (0, 99, "batches 0 to 9 of 0 to 9"),
    ):
        plots.timeline(spans, tmp_path / "run.svg", first=first, last=last)
        assert shown in svg(tmp_path / "run.svg")
    with pytest.raises(ValueError, match="no batch from 10 to 15: the trace has 0 to 9"):
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
    plots.timeline(spans, tmp_path / "run.svg", first=0, last=9)
    assert "idle in this picture: 0.5 s, for launch" in svg(tmp_path / "run.svg")


def places(text: str) -> dict[str, tuple[float, float]]:
    """Where words are written, in points from the top left."""
    found = re.findall(r"<!-- ([^\n]*) -->\s*<g style=[^>]*?transform=\"translate\(([\d.]+) ([\d.]+)\)", text)
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
    assert found["fetch 4 s"][0] < found["end hooks 3 s"][0]


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
    text = svg(tmp_path / "run.svg")
    assert {"compile 1", "compile 4 s"} <= places(text).keys()
    # One of either batch, and the legend's.
    colours = [text.count(f"fill: {colour}; stroke: #222222") for colour in plots._COLOURS[:2]]
    assert colours == [2, 1]


def test_words_of_an_outer_stage_make_room_for_those_of_an_inner_one(tmp_path: Path) -> None:
    spans = [
        Span(Stage.LAUNCH, Lane.MAIN, 0, 4, 0),
        Span(Stage.REPLAY, Lane.MAIN, 0, 4, 0),
        Span(Stage.END_HOOKS, Lane.MAIN, 4, 8, 0),
    ]
    plots.timeline(spans, tmp_path / "run.svg")
    found = places(svg(tmp_path / "run.svg"))
    assert found["launch 0"][1] + 5 < found["end hooks 0"][1] < found["replay 0"][1] - 5


def test_a_line_leads_from_each_idle_time_to_its_words(tmp_path: Path) -> None:
    spans = [
        Span(Stage.LAUNCH, Lane.MAIN, 0, 1.5, 0),
        Span(Stage.DEVICE, Lane.DEVICE, 1.5, 98.5, 0),
        Span(Stage.END_HOOKS, Lane.MAIN, 98.5, 100, 0),
    ]
    plots.timeline(spans, tmp_path / "run.svg")
    text = svg(tmp_path / "run.svg")
    found = places(text)
    lines = re.findall(
        r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"[^>]*?style="fill: none; stroke: #b3202a', text
    )
    assert len(lines) == 2
    for line, words in zip(
        sorted(lines, key=lambda line: float(line[0])), ("launch 1.5 s", "end hooks 1.5 s"), strict=True
    ):
        x, width = found[words][0], plots._points(words)
        assert x + 0.2 * width < float(line[2]) < x + 0.8 * width


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
