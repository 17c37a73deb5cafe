"""From spans to a verdict: what the device waited for, and what to change next."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from heapq import heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.trace import Lane, Span, Stage

if TYPE_CHECKING:
    from rich.console import RenderableType

Piece = tuple[float, float, Stage | None]
"""Start and end in seconds, and what it was spent on; None is host work outside of all stages."""


class Verdict(str, Enum):
    """What limits the run."""

    INPUT = "input-bound"
    LAUNCH = "launch-bound"
    DEVICE = "device-bound"
    OUTPUT = "output-bound"


class Severity(str, Enum):
    """How much of the device's time it costs. A device-bound run has none."""

    NONE = "none"
    MODERATE = "moderate"
    HIGH = "high"


_THRESHOLDS = {Verdict.INPUT: (0.05, 0.20), Verdict.LAUNCH: (0.03, 0.15), Verdict.OUTPUT: (0.05, 0.20)}
"""Shares of the device's time from which a cause is moderate, and high: those of TensorFlow's profiler."""

_VERDICTS: dict[Stage | None, Verdict] = {
    **dict.fromkeys((Stage.FETCH, Stage.PREPARE, Stage.PIN, Stage.WAIT_INPUT, Stage.COPY_IN, Stage.H2D), Verdict.INPUT),
    **dict.fromkeys(
        (Stage.START_HOOKS, Stage.LAUNCH, Stage.CAPTURE, Stage.REPLAY, Stage.COMPILE, None), Verdict.LAUNCH
    ),
    **dict.fromkeys((Stage.WAIT_OUTPUT, Stage.COPY_OUT, Stage.END_HOOKS, Stage.D2H), Verdict.OUTPUT),
    Stage.DEVICE: Verdict.DEVICE,
}


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What spans do not show: graphs, padding and staging of a run."""

    captures: int = 0
    replays: int = 0
    plain_calls: int = 0
    """Calls of networks that ran without a graph."""
    evictions: int = 0
    """Graphs dropped to make room for others."""
    verified: int = 0
    """Calls that were compared with the plain forward."""
    padded_elements: int = 0
    """Elements of all inputs as the device got them."""
    real_elements: int = 0
    """Those of them that were no padding."""
    pinned_copies: int = 0
    copies: int = 0
    """Tensors copied to the device; `pinned_copies` of them from pinned memory."""

    @property
    def padding_waste(self) -> float:
        """Share of the inputs that was padding."""
        return 1 - self.real_elements / self.padded_elements if self.padded_elements else 0.0


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """What one stage took in one lane, without the stages inside of it."""

    lane: Lane
    stage: Stage
    seconds: float
    share: float
    """Of the run's time. Those of a lane add up to 1 at most: the rest was spent on no stage."""
    spans: int


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What the device's idle time went to; without a device trace, the main thread's time."""

    stage: Stage | None
    """None is host work outside of all stages."""
    seconds: float
    share: float
    """Of the time from the device's first program to its last; without a device trace, of the run's time."""

    @property
    def label(self) -> str:
        """The stage in words."""
        return self.stage.value if self.stage is not None else "other host work"


@dataclass(frozen=True, kw_only=True)
class DeviceTime:
    """The device's part of the run, in seconds. The four add up to the run's time."""

    before: float
    """Until its first program."""
    busy: float
    idle: float
    """Between its first and its last program; compilation is idle time too."""
    after: float
    """Since its last program."""


@dataclass(frozen=True, kw_only=True)
class CopyTime:
    """One direction of copies."""

    lane: Lane
    nbytes: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run's spans say. Prints itself with `rich.print(report)`; `to_json` is for programs."""

    verdict: Verdict
    severity: Severity
    advice: str
    """The next thing to change."""
    measured_on: str
    """Where the spans were recorded, as the caller named it."""
    batches: int
    """0 if the spans do not say."""
    seconds: float
    """From the first span's start to the last span's end."""
    stages: tuple[StageTime, ...]
    device: DeviceTime | None
    """None without a device trace: the verdict is the host's side of the story then."""
    causes: tuple[Cause, ...]
    """Largest first. They add up to the device's idle time; without a device trace, to the run's time."""
    copies: tuple[CopyTime, ...]
    bound: Lane
    """The busiest lane. All lanes work at the same time at best, so it sets the pace that can be reached."""
    bound_seconds: float
    """What that lane worked, waits left out."""
    counters: Counters
    tuning: tuple[str, ...] = ()
    """What `pipelining="auto"` tried, what came of it, and what it ended with."""

    @property
    def throughput(self) -> float:
        """Batches per second."""
        return _share(self.batches, self.seconds)

    @property
    def efficiency(self) -> float | None:
        """Share of the run during which the device was busy: the share of its ceiling that was reached."""
        return _share(self.device.busy, self.seconds) if self.device else None

    @property
    def idle_share(self) -> float | None:
        """Idle share of the device's time from its first program to its last."""
        return _share(self.device.idle, self.device.busy + self.device.idle) if self.device else None

    @property
    def main_cause(self) -> Cause | None:
        """The largest cause behind the verdict."""
        return next((cause for cause in self.causes if _verdict_of(cause.stage, self) == self.verdict), None)

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        line = self.verdict.value
        if self.severity != Severity.NONE:
            line += f" ({self.severity.value})"
        if self.device is None:
            return f"{line}, judged by the host alone"
        line += f": device busy {self.efficiency:.0%}"
        return line if self.main_cause is None else f"{line}, idle mostly for {self.main_cause.label}"

    def as_dict(self) -> dict[str, Any]:
        """Fields, and the properties worth having beside them, as JSON values."""
        fields = asdict(self, dict_factory=lambda items: {name: _plain(value) for name, value in items})
        return fields | {
            "throughput": self.throughput,
            "efficiency": self.efficiency,
            "idle_share": self.idle_share,
            "padding_waste": self.counters.padding_waste,
        }

    def to_json(self) -> str:
        """`as_dict` as text. `from_json` gives back an equal report."""
        return json.dumps(self.as_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: If it is no report.
        """
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """Read what `as_dict` made.

        Raises:
            KeyError, TypeError, ValueError: If it is no report.
        """
        return cls(
            verdict=Verdict(data["verdict"]),
            severity=Severity(data["severity"]),
            advice=data["advice"],
            measured_on=data["measured_on"],
            batches=data["batches"],
            seconds=data["seconds"],
            stages=tuple(
                StageTime(**entry | {"lane": Lane(entry["lane"]), "stage": Stage(entry["stage"])})
                for entry in data["stages"]
            ),
            device=DeviceTime(**data["device"]) if data["device"] else None,
            causes=tuple(
                Cause(**entry | {"stage": entry["stage"] and Stage(entry["stage"])}) for entry in data["causes"]
            ),
            copies=tuple(CopyTime(**entry | {"lane": Lane(entry["lane"])}) for entry in data["copies"]),
            bound=Lane(data["bound"]),
            bound_seconds=data["bound_seconds"],
            counters=Counters(**data["counters"]),
            tuning=tuple(data.get("tuning", ())),
        )

    def __rich__(self) -> "RenderableType":
        return _render(self)


def analyse(
    spans: Sequence[Span],
    *,
    config: InferenceConfig | None = None,
    counters: Counters | None = None,
    measured_on: str = "",
    tuning: Sequence[str] = (),
) -> Report:
    """Find out what limits a run.

    Args:
        spans: All spans of the run, in any order.
        config: The flags that were on; the advice leaves out what is on already. None counts as all off.
        counters: What the spans do not show.
        tuning: What `pipelining="auto"` did.
        measured_on: Name of the device, such as "emulated HPU". On "cpu" the launch is the computation.

    Raises:
        ValueError: If there are no spans.
    """
    if not spans:
        raise ValueError("There is nothing to analyse: no span was recorded. Trace a run of at least one batch.")
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    lanes = {lane: timeline(span for span in spans if span.lane == lane) for lane in Lane}
    gaps = device_gaps(spans)
    programs = _programs(spans)
    device = None
    if programs:
        idle = sum(piece[1] - piece[0] for gap in gaps for piece in gap)
        before, window, after = programs[0][0] - start, programs[-1][1] - programs[0][0], end - programs[-1][1]
        device = DeviceTime(before=before, busy=window - idle, idle=idle, after=after)
        base, pieces = window, [piece for gap in gaps for piece in gap]
    else:
        base, pieces = end - start, _host_pieces([(start, end, None)], spans)
    bound, bound_seconds = _bound(lanes, programs)
    report = Report(
        verdict=Verdict.DEVICE,
        severity=Severity.NONE,
        advice="",
        measured_on=measured_on,
        batches=_count_batches(spans),
        seconds=end - start,
        stages=_stage_times(spans, lanes, end - start),
        device=device,
        causes=_causes(pieces, base),
        copies=_copy_times(spans),
        bound=bound,
        bound_seconds=bound_seconds,
        counters=counters or Counters(),
        tuning=tuple(tuning),
    )
    verdict, severity = _judge(report)
    report = replace(report, verdict=verdict, severity=severity)
    return replace(report, advice=_advise(report, config))


def device_gaps(spans: Sequence[Span]) -> list[list[Piece]]:
    """The times between its first and its last program when the device computed nothing, each cut by cause.

    A piece belongs to what the main thread was in; where it waited for input, to what the prefetch thread was in; where
    it waited for output, to the copy under way. Compilation comes before all of them.
    """
    gaps: list[Piece] = [(left[1], right[0], None) for left, right in pairwise(_programs(spans))]
    compiled = _cut(gaps, None, timeline(span for span in spans if span.stage == Stage.COMPILE))
    pieces = _host_pieces(compiled, spans)
    cut: list[list[Piece]] = []
    position = 0
    for _, end, _ in gaps:
        first = position
        while position < len(pieces) and pieces[position][1] <= end:
            position += 1
        cut.append(pieces[first:position])
    return cut


def timeline(spans: Iterable[Span]) -> list[Piece]:
    """One lane without overlaps, in order of time: of stages inside each other, the innermost."""
    waiting = sorted((span for span in spans if span.end > span.start), key=lambda span: span.start)
    pieces: list[Piece] = []
    current: list[tuple[float, float, int]] = []
    begun = 0
    edges = sorted({edge for span in waiting for edge in (span.start, span.end)})
    for left, right in pairwise(edges):
        while begun < len(waiting) and waiting[begun].start <= left:
            # The innermost is the one that began last; of those that began together, the one that ends first.
            heappush(current, (-waiting[begun].start, waiting[begun].end, begun))
            begun += 1
        while current and current[0][1] <= left:
            heappop(current)
        if current:
            pieces.append((left, right, waiting[current[0][2]].stage))
    return pieces


def _host_pieces(pieces: list[Piece], spans: Sequence[Span]) -> list[Piece]:
    main = timeline(span for span in spans if span.lane == Lane.MAIN)
    prefetch = timeline(span for span in spans if span.lane == Lane.PREFETCH)
    copies = timeline(span for span in spans if span.lane in (Lane.H2D, Lane.D2H))
    pieces = _cut(pieces, None, main)
    pieces = _cut(pieces, Stage.WAIT_INPUT, prefetch)
    return _cut(pieces, Stage.WAIT_OUTPUT, copies)


def _cut(pieces: list[Piece], unclear: Stage | None, lane: list[Piece]) -> list[Piece]:
    """Explain those pieces whose cause is `unclear` by what happened in `lane`, where anything did."""
    explained: list[Piece] = []
    position = 0
    for start, end, cause in pieces:
        if cause is not unclear:
            explained.append((start, end, cause))
            continue
        while position < len(lane) and lane[position][1] <= start:
            position += 1
        done, index = start, position
        while index < len(lane) and lane[index][0] < end:
            left, right = max(lane[index][0], start), min(lane[index][1], end)
            if left > done:
                explained.append((done, left, unclear))
            explained.append((left, right, lane[index][2]))
            done, index = right, index + 1
        if done < end:
            explained.append((done, end, unclear))
    return explained


def _programs(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """When the device computed: disjoint intervals in order."""
    merged: list[tuple[float, float]] = []
    found = (span for span in spans if span.lane == Lane.DEVICE and span.stage != Stage.COMPILE)
    for start, end in sorted((span.start, span.end) for span in found):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _stage_times(spans: Sequence[Span], lanes: Mapping[Lane, list[Piece]], total: float) -> tuple[StageTime, ...]:
    seconds: dict[tuple[Lane, Stage], list[float]] = {}
    spent: dict[tuple[Lane, Stage], int] = {}
    for lane, pieces in lanes.items():
        for start, end, stage in pieces:
            assert stage is not None
            seconds.setdefault((lane, stage), []).append(end - start)
    for span in spans:
        spent[span.lane, span.stage] = spent.get((span.lane, span.stage), 0) + 1
    return tuple(
        StageTime(
            lane=lane,
            stage=stage,
            seconds=(own := math.fsum(seconds.get((lane, stage), ()))),
            share=_share(own, total),
            spans=spent[lane, stage],
        )
        for lane in Lane
        for stage in Stage
        if (lane, stage) in spent
    )


def _causes(pieces: list[Piece], base: float) -> tuple[Cause, ...]:
    seconds: dict[Stage | None, list[float]] = {}
    for start, end, stage in pieces:
        seconds.setdefault(stage, []).append(end - start)
    totals = {stage: math.fsum(parts) for stage, parts in seconds.items()}
    return tuple(
        Cause(stage=stage, seconds=total, share=_share(total, base))
        for stage, total in sorted(totals.items(), key=lambda item: -item[1])
        if total > 0
    )


def _copy_times(spans: Sequence[Span]) -> tuple[CopyTime, ...]:
    copies = {lane: [span for span in spans if span.lane == lane] for lane in (Lane.H2D, Lane.D2H)}
    return tuple(
        CopyTime(
            lane=lane,
            nbytes=sum(span.nbytes for span in found),
            seconds=math.fsum(end - start for start, end, _ in timeline(found)),
        )
        for lane, found in copies.items()
        if found
    )


def _bound(lanes: Mapping[Lane, list[Piece]], programs: list[tuple[float, float]]) -> tuple[Lane, float]:
    busy: list[Piece] = [(start, end, Stage.DEVICE) for start, end in programs]
    # A blocking copy of a result waits for the device first.
    main = _cut(lanes[Lane.MAIN], Stage.COPY_OUT, busy)
    waits = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT, Stage.DEVICE)
    work = {lane: math.fsum(end - start for start, end, _ in pieces) for lane, pieces in lanes.items()}
    work[Lane.MAIN] = math.fsum(end - start for start, end, stage in main if stage not in waits)
    work[Lane.DEVICE] = math.fsum(end - start for start, end in programs)
    return max(work.items(), key=lambda item: item[1])


def _count_batches(spans: Sequence[Span]) -> int:
    launched = {span.batch for span in spans if span.stage == Stage.LAUNCH and span.batch is not None}
    return len(launched or {span.batch for span in spans if span.batch is not None})


def _verdict_of(stage: Stage | None, report: Report) -> Verdict:
    if report.device is None:
        if stage == Stage.WAIT_OUTPUT:
            return Verdict.DEVICE
        if stage in (Stage.LAUNCH, Stage.REPLAY) and report.measured_on == "cpu":
            return Verdict.DEVICE
    return _VERDICTS[stage]


def _judge(report: Report) -> tuple[Verdict, Severity]:
    shares = dict.fromkeys(Verdict, 0.0)
    for cause in report.causes:
        shares[_verdict_of(cause.stage, report)] += cause.share
    if report.device is None:
        # The main thread is always in something: only what it is in most says anything.
        candidates = [max(shares, key=lambda verdict: shares[verdict])]
    else:
        candidates = sorted(_THRESHOLDS, key=lambda verdict: -shares[verdict])
    for verdict in candidates:
        moderate, high = _THRESHOLDS.get(verdict, (math.inf, math.inf))
        if shares[verdict] >= moderate:
            return verdict, Severity.HIGH if shares[verdict] >= high else Severity.MODERATE
    return Verdict.DEVICE, Severity.NONE


def _advise(report: Report, config: InferenceConfig | None) -> str:
    on = config or InferenceConfig(hpu_graphs=False, async_copy=False, pipelining=False)
    stage = report.main_cause.stage if report.main_cause else None
    match report.verdict:
        case Verdict.INPUT:
            return _input_advice(report, on, stage)
        case Verdict.LAUNCH:
            return _launch_advice(report, on, stage)
        case Verdict.OUTPUT:
            return _output_advice(report, on, stage)
        case Verdict.DEVICE:
            return _device_advice(report)


def _input_advice(report: Report, on: InferenceConfig, stage: Stage | None) -> str:
    if stage in (Stage.COPY_IN, Stage.H2D):
        return _copy_advice(report, on)
    if not on.pipelining:
        return "Pass `pipelining=True`: a thread then prepares the next batches while the device works."
    if on.prefetch == 0:
        return "Pass `prefetch=2`: with 0 each batch is prepared only when the device is out of work."
    each = _Each(report)
    if stage == Stage.PREPARE:
        return (
            f"Move work out of `on_before_batch_transfer` ({each.stage(Stage.PREPARE)}): tokenize and pad in the"
            " dataset or the collate function, where the DataLoader's `num_workers` share it."
        )
    if stage == Stage.PIN:
        return (
            f"Make inputs smaller ({each.stage(Stage.PIN)} to copy them to pinned memory): uint8 images, int32 ids,"
            " normalized or embedded on the device."
        )
    supply, rest = each.lane(Lane.PREFETCH), each.others(Lane.PREFETCH)
    if supply < rest:
        return (
            f"Raise `prefetch` from {on.prefetch or 2} to {2 * (on.prefetch or 2)}: batches are prepared fast enough on"
            " the whole, but unevenly."
        )
    workers = max(2, math.ceil(supply / rest)) if rest else 2
    return (
        f"Raise `num_workers` of the DataLoader: fetching takes {each.stage(Stage.FETCH)}, everything else"
        f" {rest * 1e3:.3g} ms. From 0 workers, go to {workers}; from more, to {workers} times as many. Workers run the"
        " dataset and the collate function: put tokenization and decoding there."
    )


def _copy_advice(report: Report, on: InferenceConfig) -> str:
    counters = report.counters
    if not on.async_copy:
        return "Pass `async_copy=True`: inputs are copied from pinned memory, without holding up the host."
    if not on.pipelining:
        return "Pass `pipelining=True`: the next batch is copied while the device works on this one."
    if counters.pinned_copies * 2 < counters.copies:
        return (
            f"Hand over int32 and float32 tensors: only {counters.pinned_copies} of {counters.copies} copies came from"
            " pinned memory, since 64-bit types are converted on the host first."
        )
    return (
        "Copy less to the device: uint8 images and int32 ids, converted there; and make no copies of your own in"
        " `transfer_batch_to_device` or `on_after_batch_transfer`."
    )


def _launch_advice(report: Report, on: InferenceConfig, stage: Stage | None) -> str:
    counters, each = report.counters, _Each(report)
    if stage in (Stage.CAPTURE, Stage.COMPILE):
        captured = f" ({counters.captures} graphs for {report.batches} batches)" if counters.captures else ""
        return (
            f"Capturing and compiling are paid once per input shape{captured}: predict more batches in one run, or pad"
            " them to a few shapes (`bucket_lengths`, and a full last batch)."
        )
    if not on.hpu_graphs:
        return (
            "Pass `hpu_graphs=True`, with PT_HPU_LAZY_MODE=1 in the environment: a captured network is replayed without"
            " running its Python."
        )
    if counters.evictions:
        return (
            f"Raise `max_graphs` (now {on.max_graphs}), or pad batches to fewer shapes (`bucket_lengths`):"
            f" {counters.evictions} graphs were dropped and captured again."
        )
    if counters.plain_calls > counters.replays:
        return (
            f"{counters.plain_calls} of {counters.plain_calls + counters.replays} calls of networks ran without a"
            " graph: the warnings of the run say why."
        )
    if not on.pipelining:
        return "Pass `pipelining=True`: the next batch is launched while the device works on this one."
    if on.in_flight == 0:
        return "Pass `in_flight=1`: the next batch is launched before this one's output is waited for."
    if stage == Stage.START_HOOKS:
        return f"Make `on_predict_batch_start` hooks cheaper ({each.stage(Stage.START_HOOKS)})."
    where = "between the stages" if stage is None else "to launch"
    return (
        f"Use larger batches: the host works {each.cause(stage)} {where}, however large the batch is. Move Python"
        " out of `predict_step` into the network, and try `enable_progress_bar=False`."
    )


def _output_advice(report: Report, on: InferenceConfig, stage: Stage | None) -> str:
    if not on.pipelining:
        return (
            "Pass `pipelining=True`: outputs are fetched, and end hooks run, while the device works on a later batch."
        )
    if on.in_flight == 0:
        return "Pass `in_flight=1`: an output is then fetched while the device works on the next batch."
    if stage == Stage.END_HOOKS and not on.defer_hooks:
        return "Pass `defer_hooks=True`: end hooks then run when the output has arrived and do not wait for it."
    each = _Each(report)
    if each.lane(Lane.DEVICE) > each.others(Lane.DEVICE):
        return (
            f"Raise `in_flight` from {on.in_flight} to {on.in_flight + 1}: the output side is fast enough on the whole,"
            " but the device runs out of launched batches now and then."
        )
    if stage == Stage.END_HOOKS:
        return (
            f"Make end hooks cheaper ({each.stage(Stage.END_HOOKS)}): post-process on the device, write fewer and"
            " larger files or write in a thread, and update the progress bar less often."
        )
    return (
        "Return less from `predict_step`: reduce on the device (`argmax`, `topk`, pooling) or return half precision,"
        " and nothing that nobody reads."
    )


def _device_advice(report: Report) -> str:
    counters, device = report.counters, report.device
    if device is not None and device.before + device.after > device.busy + device.idle:
        return (
            f"The device keeps busy once it runs, but {device.before:.3g} s passed before its first program and"
            f" {device.after:.3g} s after its last, of {report.seconds:.3g} s: predict more batches in one run."
        )
    if counters.padding_waste > 0.2:
        return (
            f"The device is the limit, and {counters.padding_waste:.0%} of its input is padding: sort samples by"
            " length, or give `bucket_lengths` more steps."
        )
    if report.measured_on == "cpu":
        return "The computation is the limit, and it runs on the CPU: predict on an HPU."
    return (
        "The device is the limit. Faster is lower precision (`precision='bf16-true'`), larger batches where it is not"
        " filled yet, or more devices (`devices=2`)."
    )


class _Each:
    """Times per batch, in seconds or in words."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._batches = max(report.batches, 1)

    def stage(self, stage: Stage) -> str:
        return self._words(sum(time.seconds for time in self._report.stages if time.stage == stage))

    def cause(self, stage: Stage | None) -> str:
        return self._words(sum(cause.seconds for cause in self._report.causes if cause.stage == stage))

    def lane(self, lane: Lane) -> float:
        waits = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT, Stage.COPY_OUT, Stage.COMPILE)
        work = (time.seconds for time in self._report.stages if time.lane == lane and time.stage not in waits)
        return sum(work) / self._batches

    def others(self, lane: Lane) -> float:
        return max(self.lane(other) for other in Lane if other != lane)

    def _words(self, seconds: float) -> str:
        return f"{seconds / self._batches * 1e3:.3g} ms" + (" per batch" if self._report.batches else " in all")


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


_WORTH_PRINTING = 0.005
_COLOURS = {Severity.NONE: "green", Severity.MODERATE: "yellow", Severity.HIGH: "red"}


def _render(report: Report) -> "RenderableType":
    from rich import box
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    def table(*columns: str) -> Table:
        made = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for column in made.columns[1:]:
            column.justify = "right"
        return made

    lines = [_overview(report)]
    parts: list[RenderableType] = []
    if report.causes:
        of = "of the device's time" if report.device else "of the run"
        causes = table("The device was idle for" if report.device else "The main thread was in", "seconds", of)
        shown = [cause for cause in report.causes if cause.share >= _WORTH_PRINTING] or report.causes[:1]
        for cause in shown:
            causes.add_row(cause.label, f"{cause.seconds:.3f}", f"{cause.share:.1%}")
        if rest := report.causes[len(shown) :]:
            share, seconds = (sum(getattr(cause, name) for cause in rest) for name in ("share", "seconds"))
            causes.add_row("all else", f"{seconds:.3f}", f"{share:.1%}")
        parts.append(causes)
    stages = table("Stage", "lane", "seconds", "of the run", "ms each")
    for time in report.stages:
        each = time.seconds / time.spans * 1e3
        stages.add_row(time.stage.value, time.lane.value, f"{time.seconds:.3f}", f"{time.share:.1%}", f"{each:.3f}")
    parts.append(stages)
    lines += [
        f"{copy.lane.value}: {copy.nbytes / 1e6:.1f} MB in {copy.seconds:.3f} s, {copy.bandwidth / 1e9:.2f} GB/s"
        for copy in report.copies
    ]
    counters = report.counters
    if counters.captures or counters.replays or counters.plain_calls:
        lines.append(
            f"graphs: {counters.captures} captures, {counters.replays} replays, {counters.plain_calls} plain calls,"
            f" {counters.evictions} evictions, {counters.verified} verified"
        )
    if counters.padded_elements:
        lines.append(f"padding: {counters.padding_waste:.0%} of the inputs")
    if counters.copies:
        lines.append(f"pinned: {counters.pinned_copies} of {counters.copies} copies to the device")
    lines += report.tuning
    colour = _COLOURS[report.severity]
    title = Text(report.summary, style=f"bold {colour}")
    advice = Text.assemble(("Next: ", "bold"), report.advice)
    where = f"measured on {report.measured_on}" if report.measured_on else None
    return Panel(
        Group(Text("\n".join(lines)), *parts, advice), title=title, subtitle=where, border_style=colour, expand=False
    )


def _overview(report: Report) -> str:
    batches = f"{report.batches} batches in {report.seconds:.3f} s, {report.throughput:.1f} per second"
    lines = [batches if report.batches else f"{report.seconds:.3f} s; the trace does not tell batches apart"]
    device = report.device
    if device is None:
        lines.append("No program of a device is in the trace: judged by what the host was in.")
    else:
        lines.append(
            f"{report.efficiency:.0%} of the device's ceiling: busy {device.busy:.3f} s, idle {device.idle:.3f} s,"
            f" {device.before:.3f} s before its first program, {device.after:.3f} s after its last"
        )
    each = report.bound_seconds / max(report.batches, 1) * 1e3
    lines.append(f"busiest: {report.bound.value}, {each:.3g} ms{' per batch' if report.batches else ''}")
    return "\n".join(lines)
