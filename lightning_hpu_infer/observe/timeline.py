"""Pictures of a trace. Needs matplotlib: `pip install lightning-hpu-infer[plots]`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from os import PathLike
from typing import TYPE_CHECKING, Any

from lightning_hpu_infer.observe.gaps import Piece, device_gaps
from lightning_hpu_infer.observe.spans import Lane, Span, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BATCHES_SHOWN = 6
_SPANS_SHOWN = 200
"""Where spans belong to no batch."""

_COLOURS = ("#8ecae6", "#ffc971", "#95d5b2", "#f4a6c0", "#c8b6ff")
"""Pale relatives of Okabe and Ito's: told apart by colour-blind people, and black text is readable on them."""
_NO_BATCH = "#d9d9d9"
_IDLE = "#b3202a"
_INK = "#222222"
_WAITS = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT)
_CODES = {
    Stage.FETCH: "F",
    Stage.PREPARE: "P",
    Stage.PIN: "pin",
    Stage.WAIT_INPUT: "w",
    Stage.COPY_IN: "in",
    Stage.START_HOOKS: "S",
    Stage.LAUNCH: "L",
    Stage.CAPTURE: "C",
    Stage.REPLAY: "R",
    Stage.WAIT_OUTPUT: "w",
    Stage.COPY_OUT: "out",
    Stage.END_HOOKS: "E",
}
"""What boxes say that are too narrow for the stage's name."""

_WIDTH_INCHES = 14.0
_LEFT_INCHES, _RIGHT_INCHES = 1.35, 0.2
_BOTTOM_INCHES, _TOP_INCHES = 0.75, 0.55
_ROW_INCHES = 0.62
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
_SIZE = 8.0
"""Of the text in boxes, in points."""
_BOX = 0.78
"""Height of a box, of a row that is 1 high."""
_INNER = 0.42
"""Height of a box inside of another."""
_LEVELS, _LEVEL = 3, 0.33
"""Lines of reasons below the device, and the height of each."""
_SLACK = 5e-9
"""Seconds by which spans that touch may overlap."""
_NAMED = 3
"""Stages that a sum of idle times names."""
_WORTH_SAYING = 0.012
"""Share of the picture from which an idle time gets its own words."""


def timeline(
    spans: Sequence[Span],
    path: str | PathLike[str],
    *,
    first: int | None = None,
    last: int | None = None,
    title: str = "",
) -> None:
    """Draw what each lane did when, and what the host was doing while the device computed nothing.

    Args:
        spans: All spans of the run, in any order.
        path: The picture; its suffix is its format, such as `.png` and `.svg`.
        first: First batch to show. With neither given, some batches in the middle are shown, where the run is steady.
        last: Last batch to show.
        title: What to write above, such as a report's `summary`.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is nothing to draw, or matplotlib does not know the suffix.
    """
    if not spans:
        raise ValueError("There is nothing to draw: no span was recorded. Trace a run of at least one batch.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install lightning-hpu-infer[plots]") from error
    window, shown = _window(spans, first, last)
    # Not pyplot: it keeps figures in a list of its own, and would ask for a display.
    figure = Figure(dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    _Picture(figure, spans, window).draw("\n".join(filter(None, (title, shown))))
    figure.savefig(path)


def _window(spans: Sequence[Span], first: int | None, last: int | None) -> tuple[tuple[float, float], str]:
    """The time to show in seconds, and what that is in words."""
    batches = sorted({span.batch for span in spans if span.batch is not None})
    if not batches:
        middle = sorted(spans, key=lambda span: span.start)
        skip = max(0, (len(middle) - _SPANS_SHOWN) // 2)
        chosen = middle[skip : skip + _SPANS_SHOWN]
        return _extent(chosen), "" if len(chosen) == len(spans) else f"{len(chosen)} of {len(spans)} spans"
    if first is None and last is None:
        skip = max(0, (len(batches) - _BATCHES_SHOWN) // 2)
        first, last = batches[skip], batches[min(skip + _BATCHES_SHOWN, len(batches)) - 1]
    elif first is None:
        first = max(batches[0], (last or 0) - _BATCHES_SHOWN + 1)
    elif last is None:
        last = first + _BATCHES_SHOWN - 1
    assert first is not None
    assert last is not None
    chosen = [span for span in spans if span.batch is not None and first <= span.batch <= last]
    if not chosen:
        raise ValueError(f"There is no batch from {first} to {last}: the trace has {batches[0]} to {batches[-1]}.")
    last = min(last, batches[-1])
    # A batch is prepared long before it is the main thread's.
    later = [span for span in chosen if span.lane != Lane.PREFETCH]
    return _extent(later or chosen), f"batches {first} to {last} of {batches[0]} to {batches[-1]}"


def _extent(spans: Iterable[Span]) -> tuple[float, float]:
    starts, ends = zip(*((span.start, span.end) for span in spans), strict=True)
    start, end = min(starts), max(ends)
    return start, end if end > start else start + 1e-6


@dataclass
class _Box:
    """A span as a rectangle, from `left` to `right` in milliseconds."""

    span: Span
    left: float
    right: float
    inner: bool
    """Inside of another span of its lane."""
    outer: bool = False
    """Has others inside."""


@dataclass(frozen=True)
class _Reason:
    """Words below an idle time of the device."""

    left: float
    right: float
    text: str
    middle: float
    """Of the words, which stay inside the picture."""
    level: int


class _Picture:
    """A row per lane, and lines of reasons under the device's."""

    def __init__(self, figure: "Figure", spans: Sequence[Span], window: tuple[float, float]) -> None:
        self._figure, self._spans = figure, spans
        self._start, self._end = window
        self._width = (self._end - self._start) * 1e3
        self._points_per_ms = (_WIDTH_INCHES - _LEFT_INCHES - _RIGHT_INCHES) * 72 / self._width
        gaps = device_gaps(spans) if any(span.lane == Lane.DEVICE for span in spans) else []
        self._gaps = [gap for gap in gaps if gap[-1][1] > self._start and gap[0][0] < self._end]
        self._reasons, self._all_said = self._place_reasons()
        self._lines = max((reason.level + 1 for reason in self._reasons), default=0) + (not self._all_said)
        self._rows: dict[Lane, float] = {}
        height = 0.0
        for lane in Lane:
            if any(span.lane == lane for span in spans):
                self._rows[lane] = height
                height += 1 + (self._lines * _LEVEL + 0.1 if lane == Lane.DEVICE and self._lines else 0)
        total = _BOTTOM_INCHES + _TOP_INCHES + height * _ROW_INCHES
        figure.set_size_inches(_WIDTH_INCHES, total)
        place = (
            _LEFT_INCHES / _WIDTH_INCHES,
            _BOTTOM_INCHES / total,
            1 - (_LEFT_INCHES + _RIGHT_INCHES) / _WIDTH_INCHES,
            height * _ROW_INCHES / total,
        )
        self._axes: Axes = figure.add_axes(place, xlim=(0, self._width), ylim=(height - 0.5, -0.5))
        self._codes: dict[str, str] = {}

    def draw(self, title: str) -> None:
        for lane, row in self._rows.items():
            boxes = _boxes([span for span in self._spans if span.lane == lane], self._start, self._end)
            self._draw_boxes(boxes, row)
            for box in boxes:
                self._write_in(box, row)
        if Lane.DEVICE in self._rows:
            self._draw_gaps(self._rows[Lane.DEVICE])
        self._label(title)

    def _draw_boxes(self, boxes: list[_Box], row: float) -> None:
        styles: dict[tuple[bool, str, bool], list[_Box]] = {}
        for box in boxes:
            waits = box.span.stage in _WAITS
            colour = "white" if waits else _colour(box.span.batch)
            if box.span.stage == Stage.COMPILE:
                colour = "none"  # so that the idle time shows that it is
            # An outline would be all there is to see of a narrow one.
            narrow = (box.right - box.left) * self._points_per_ms < 2
            colour = _darker(colour) if narrow and colour.startswith("#") else colour
            styles.setdefault((box.inner, colour, narrow), []).append(box)
        for (inner, colour, narrow), same in styles.items():
            bottom, height = (row + _BOX / 2 - _INNER, _INNER) if inner else (row - _BOX / 2, _BOX)
            self._axes.broken_barh(
                [(box.left, box.right - box.left) for box in same],
                (bottom, height),
                facecolor=colour,
                edgecolor="none" if narrow else "#888888" if colour == "white" else _INK,
                linestyle=(0, (2, 2)) if colour == "white" else "solid",
                linewidth=0.7,
                zorder=3 if inner else 2,
            )

    def _write_in(self, box: _Box, row: float) -> None:
        left, right = max(box.left, 0.0), min(box.right, self._width)
        room = (right - left) * self._points_per_ms - 3
        if room < _SIZE / 2:
            return
        stage, flat = box.span.stage, box.inner or box.outer
        text = next((text for text in _wordings(box.span, flat) if _points(text) <= room), "")
        code = _CODES.get(stage)
        if code and text.split("\n")[0].split(" ")[0] == code:
            self._codes[code] = "wait" if stage in _WAITS else stage.value
        self._axes.text(
            (left + right) / 2,
            row + (_BOX - _INNER) / 2 if box.inner else row - _INNER / 2 if box.outer else row,
            text,
            ha="center",
            va="center",
            fontsize=_SIZE,
            color="#666666" if stage in _WAITS else _INK,
            bbox=_ON_WHITE if stage == Stage.COMPILE and text else None,
            linespacing=0.95,
            zorder=4,
        )

    def _place_reasons(self) -> tuple[list[_Reason], bool]:
        """Words for the longest idle times, as far as there is room, and whether none is left out."""
        placed: list[_Reason] = []
        all_said = True
        for gap in sorted(self._gaps, key=lambda gap: gap[0][0] - gap[-1][1]):
            left, right = self._clip(gap)
            reason = self._place(placed, gap, left, right) if right - left >= _WORTH_SAYING * self._width else None
            if reason is not None:
                placed.append(reason)
            elif self._start <= gap[0][0] and gap[-1][1] <= self._end:
                all_said = False
        return placed, all_said

    def _place(self, placed: list[_Reason], gap: list[Piece], left: float, right: float) -> _Reason | None:
        text = f"{_reason([gap])} {_duration(gap[-1][1] - gap[0][0])}"
        half = (_points(text) + 6) / self._points_per_ms / 2
        middle = max(min((left + right) / 2, self._width - half), half)
        for level in range(_LEVELS - 1):
            if not self._taken(placed, level, middle, half):
                return _Reason(left, right, text, middle, level)
        return None

    def _taken(self, placed: list[_Reason], level: int, middle: float, half: float) -> bool:
        others = (reason for reason in placed if reason.level == level)
        return any(
            abs(other.middle - middle) < half + (_points(other.text) + 6) / self._points_per_ms / 2 for other in others
        )

    def _clip(self, gap: list[Piece]) -> tuple[float, float]:
        return (max(gap[0][0], self._start) - self._start) * 1e3, (min(gap[-1][1], self._end) - self._start) * 1e3

    def _draw_gaps(self, row: float) -> None:
        style: dict[str, Any] = {"edgecolor": _IDLE, "linewidth": 0, "alpha": 0.55}
        clipped = [self._clip(gap) for gap in self._gaps]
        self._axes.broken_barh(
            [(left, right - left) for left, right in clipped],
            (row - _BOX / 2, _BOX),
            facecolor="white",
            hatch="////",
            zorder=1,
            **style,
        )
        words: dict[str, Any] = {"va": "center", "fontsize": _SIZE, "color": _IDLE, "zorder": 5}
        words["bbox"] = _ON_WHITE
        first = row + _BOX / 2 + 0.24
        for reason in self._reasons:
            y, x = first + reason.level * _LEVEL, (reason.left + reason.right) / 2
            # Words at the picture's edge are not below the middle of their gap.
            near = _points(reason.text) / self._points_per_ms / 4
            end = max(min(x, reason.middle + near), reason.middle - near)
            self._axes.plot([x, end], [row + _BOX / 2, y - 0.1], color=_IDLE, linewidth=0.6, alpha=0.7, zorder=1)
            self._axes.text(reason.middle, y, reason.text, ha="center", **words)
        if not self._all_said:
            idle = sum(right - left for left, right in clipped) / 1e3
            text = f"idle in this picture: {_duration(idle)}, for {_reason(self._gaps, _NAMED)}"
            self._axes.text(0, first + (self._lines - 1) * _LEVEL, text, ha="left", **words)

    def _label(self, title: str) -> None:
        from matplotlib.patches import Patch

        axes = self._axes
        ticks = {row: lane.value for lane, row in self._rows.items()}
        if self._lines:
            ticks[self._rows[Lane.DEVICE] + _BOX / 2 + 0.24 + (self._lines - 1) * _LEVEL / 2] = "device idle for"
        axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=9)
        axes.set_xlabel("ms", fontsize=9, labelpad=0)
        axes.grid(axis="x", color="#eeeeee")
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_title(title, loc="left", fontsize=10, pad=6)
        handles = []
        if any(span.batch is not None for span in self._spans):
            label = "one colour and number per batch"
            handles.append(Patch(facecolor=_COLOURS[0], edgecolor=_INK, linewidth=0.7, label=label))
        if any(span.stage in _WAITS for span in self._spans):
            handles.append(Patch(facecolor="white", edgecolor="#888888", linestyle=(0, (2, 2)), label="thread waits"))
        if Lane.DEVICE in self._rows:
            handles.append(Patch(facecolor="white", edgecolor=_IDLE, hatch="////", alpha=0.55, label="device idle"))
        if self._codes:
            codes = "    ".join(f"{code}: {name}" for code, name in self._codes.items())
            handles.append(Patch(facecolor="none", edgecolor="none", label=codes))
        self._figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(_LEFT_INCHES / _WIDTH_INCHES - 0.007, 0.0),
            ncol=max(len(handles), 1),
            fontsize=8.5,
            frameon=False,
            handlelength=1.6,
            columnspacing=1.6,
            handletextpad=0.5,
        )


def _boxes(spans: list[Span], start: float, end: float) -> list[_Box]:
    """The spans of a lane that are in sight, outer ones before those inside of them."""
    boxes: list[_Box] = []
    around: list[_Box] = []
    seen = (span for span in spans if start < span.end > span.start < end)
    for span in sorted(seen, key=lambda span: (span.start, -span.end)):
        # Times that were written as microseconds and a duration come back a nanosecond off.
        while around and around[-1].span.end <= span.start + _SLACK:
            around.pop()
        inner = bool(around) and span.end <= around[-1].span.end + _SLACK
        if inner:
            around[-1].outer = True
        boxes.append(_Box(span, (span.start - start) * 1e3, (span.end - start) * 1e3, inner))
        around.append(boxes[-1])
    return boxes


def _wordings(span: Span, flat: bool) -> list[str]:
    """What a box may say, best first; one line if it is `flat`."""
    number = "" if span.batch is None else f"{span.batch}"
    if span.stage in (Stage.DEVICE, Stage.H2D, Stage.D2H):
        return [number]  # the lane's name says the rest
    name, code = span.stage.value, _CODES.get(span.stage, span.stage.value)
    if span.stage in _WAITS:
        wordings = [name, name.replace(" for ", "\nfor "), "wait", code]
    else:
        words = name.replace(" ", "\n")
        wordings = [
            f"{name} {number}",
            f"{name}\n{number}",
            f"{words}\n{number}",
            f"{code} {number}",
            f"{code}\n{number}",
            code,
        ]
    return [text.strip() for text in wordings if not (flat and "\n" in text.strip())]


def _reason(gaps: list[list[Piece]], most: int = 2) -> str:
    """The stages that most of the gaps went to."""
    seconds: dict[str, float] = {}
    for start, end, stage in chain.from_iterable(gaps):
        name = "other host work" if stage is None else stage.value
        seconds[name] = seconds.get(name, 0.0) + end - start
    names = sorted(seconds, key=lambda name: -seconds[name])
    total = sum(seconds.values())
    enough = next(
        n
        for n in range(1, len(names) + 1)
        if n == most or sum(seconds[x] for x in names[:n]) >= 0.7 * total or n == len(names)
    )
    return " + ".join(names[:enough])


def _duration(seconds: float) -> str:
    scale, unit = next(
        ((scale, unit) for scale, unit in ((1, "s"), (1e3, "ms")) if seconds * scale >= 0.1), (1e6, "µs")
    )
    return f"{seconds * scale:.2g} {unit}" if seconds * scale < 100 else f"{seconds * scale:.0f} {unit}"


def _colour(batch: int | None) -> str:
    return _NO_BATCH if batch is None else _COLOURS[batch % len(_COLOURS)]


def _darker(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) * 3 // 4 for at in (1, 3, 5))
    return f"#{red:02x}{green:02x}{blue:02x}"


@lru_cache(maxsize=4096)
def _points(text: str) -> float:
    """Width of a text in points."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("sans"))
    font.set_size(_SIZE, 72)
    widths = []
    for line in text.split("\n"):
        font.set_text(line)
        widths.append(font.get_width_height()[0] / 64)
    return max(widths)
