"""A picture of a trace. Needs matplotlib: `pip install lightning-hpu-infer[plots]`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, NamedTuple

from lightning_hpu_infer.observe.gaps import Piece, device_gaps
from lightning_hpu_infer.observe.report import label_of
from lightning_hpu_infer.observe.spans import Span, in_rows
from lightning_hpu_infer.observer import WAITS, Lane, Stage

_BATCHES_SHOWN = 6
_SPANS_SHOWN = 200  # where spans belong to no batch
# One per batch, in turn: pale relatives of Okabe and Ito's, which colour-blind people can tell apart.
_COLOURS = ("#8ecae6", "#ffc971", "#95d5b2", "#f4a6c0", "#c8b6ff")
_NO_BATCH, _IDLE, _INK = "#d9d9d9", "#c0504d", "#222222"
_CHARACTERS = 170  # that a row has room for


class _Box(NamedTuple):
    """A rectangle in a row, from `start` to `end` in seconds, with the first of `words` that fits."""

    start: float
    end: float
    words: Sequence[str]
    face: str
    idle: bool = False


def timeline(spans: Sequence[Span], path: str | PathLike[str], *, first: int | None = None, title: str = "") -> None:
    """Draw what each lane did when, and what the host was doing while the device was idle.

    Args:
        spans: All spans of the run, in any order.
        path: The picture; its suffix is its format, such as `.png` and `.svg`.
        first: First of the six batches to show; by default six in the middle, where the run is steady.
        title: What to write above, such as a report's `summary`.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, or matplotlib does not know the suffix.
    """
    if not spans:
        raise ValueError("There is nothing to draw: no span was recorded. Trace a run of at least one batch.")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install lightning-hpu-infer[plots]") from error
    start, end, shown = _window(spans, first)
    # A compilation is drawn as idle time, which tells its cause.
    rows = _rows([span for span in spans if span.start <= end and span.end >= start and span.stage != Stage.COMPILE])
    caption = "one colour and number per batch"
    if any(span.lane == Lane.DEVICE for span in spans):
        gaps = [gap for gap in device_gaps(spans) if gap[0][0] < end and gap[-1][1] > start]
        rows[Lane.DEVICE, 0] = [*map(_idle, gaps), *rows.get((Lane.DEVICE, 0), [])]
        pieces = [piece for gap in gaps for piece in gap if piece[0] < end and piece[1] > start]
        here = _reasons((max(left, start), min(right, end), cause) for left, right, cause in pieces)
        caption += f"; hatched: device idle, here for {here}"
    names = sorted(rows, key=lambda row: (list(Lane).index(row[0]), row[1]))
    # Not pyplot, which keeps every figure and asks for a display.
    figure = Figure(figsize=(14, 1.3 + 0.5 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        _draw(axes, place, rows[name], start, end)
    axes.set(xlim=(0, end - start), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), ["" if row else lane.value for lane, row in names])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(EngFormatter("s"))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("\n".join(filter(None, (title, shown))), loc="left", fontsize=10)
    axes.set_xlabel(caption, loc="left", fontsize=9)
    figure.savefig(path)


def _window(spans: Sequence[Span], first: int | None) -> tuple[float, float, str]:
    """Start and end of the time to show, and what that is in words."""
    batches = sorted({span.batch for span in spans if span.batch is not None})
    if first is not None and first not in batches:
        raise ValueError(f"There is no batch {first} in the trace, which has {len(batches)} batches.")
    skip = max(0, (len(batches) - _BATCHES_SHOWN) // 2) if first is None else batches.index(first)
    shown = batches[skip : skip + _BATCHES_SHOWN]
    chosen = [span for span in spans if span.batch is not None and shown[0] <= span.batch <= shown[-1]]
    # A batch is prepared long before the main thread takes it.
    chosen = [span for span in chosen if span.lane != Lane.PREFETCH] or chosen
    if not batches:
        skip = max(0, (len(spans) - _SPANS_SHOWN) // 2)
        chosen = sorted(spans, key=lambda span: span.start)[skip : skip + _SPANS_SHOWN]
    start, end = min(span.start for span in chosen), max(span.end for span in chosen)
    words = f"batches {shown[0]} to {shown[-1]} of {batches[0]} to {batches[-1]}" if batches else ""
    return start, max(end, start + 1e-6), words


def _rows(spans: Iterable[Span]) -> dict[tuple[Lane, int], list[_Box]]:
    """The spans by lane; those inside of others, or of several workers, in rows below."""
    rows: dict[tuple[Lane, int], list[_Box]] = {}
    for span, row in in_rows(spans):
        rows.setdefault((span.lane, row), []).append(_box(span))
    return rows


def _box(span: Span) -> _Box:
    name, number = span.stage.value, "" if span.batch is None else f"{span.batch}"
    if span.stage in WAITS:
        return _Box(span.start, span.end, [name, "wait"], "white")
    colour = _NO_BATCH if span.batch is None else _COLOURS[span.batch % len(_COLOURS)]
    words = [number]  # the device's lanes tell the stage, and colours the batch
    if span.lane in (Lane.MAIN, Lane.PREFETCH):
        words = [f"{name} {number}", name.replace(" ", "\n"), number]
    return _Box(span.start, span.end, words, colour)


def _idle(gap: Sequence[Piece]) -> _Box:
    return _Box(gap[0][0], gap[-1][1], [_reasons(gap, most, "\n") for most in (2, 1)], "white", idle=True)


def _reasons(pieces: Iterable[Piece], most: int = 3, between: str = ", ") -> str:
    """What most of the idle time went to, largest first."""
    from matplotlib.ticker import EngFormatter

    nanos: Counter[str] = Counter()
    for start, end, cause in pieces:
        nanos[label_of(cause)] += round((end - start) * 1e9)
    worth = [(name, spent) for name, spent in nanos.most_common(most) if spent > 0.1 * nanos.total()]
    return between.join(f"{name} {EngFormatter('s', places=1)(spent / 1e9)}" for name, spent in worth) or "nothing"


def _draw(axes: Any, place: int, boxes: Sequence[_Box], start: float, end: float) -> None:
    """Draw what is in sight of a row, with seconds after `start` as x and `place` as y."""
    lefts = [max(box.start, start) - start for box in boxes]
    widths = [min(box.end, end) - start - left for box, left in zip(boxes, lefts, strict=True)]
    bars = axes.barh(
        [place] * len(boxes),
        widths,
        left=lefts,
        color=[box.face for box in boxes],
        edgecolor=[_IDLE if box.idle else _INK for box in boxes],
        hatch=["////" if box.idle else "" for box in boxes],
        linewidth=0.5,
    )
    for text, box, width in zip(axes.bar_label(bars, label_type="center", fontsize=8), boxes, widths, strict=True):
        room = width / (end - start) * _CHARACTERS - 0.5
        text.set_text(next((words for words in box.words if max(map(len, words.split("\n"))) <= room), ""))
        if box.idle and text.get_text():
            text.set(color=_IDLE, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
