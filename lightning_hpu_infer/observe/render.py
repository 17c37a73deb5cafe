"""A report as rich draws it."""

from operator import itemgetter

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_hpu_infer.observe.report import Report, Severity

_WORTH_PRINTING = 0.005
# Reasons for calls without a graph that are shown.
_REASONS = 3
_COLOURS = {Severity.NONE: "green", Severity.MODERATE: "yellow", Severity.HIGH: "red"}


def render(report: Report) -> RenderableType:
    """A panel: verdict, overview, causes, stages, counters, and what to change next."""

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
        reasons = sorted(counters.plain_reasons.items(), key=itemgetter(1), reverse=True)
        lines += [f"  without a graph, {times} times: {reason}" for reason, times in reasons[:_REASONS]]
    if counters.padded_elements:
        lines.append(f"padding: {counters.padding_waste:.0%} of the inputs")
    if counters.copies:
        lines.append(f"pinned: {counters.pinned_copies} of {counters.copies} copies to the device")
    lines += report.tuning
    colour = _COLOURS[report.severity]
    title = Text(report.summary, style=f"bold {colour}")
    advice = Text.assemble(("Next: ", "bold"), report.advice)
    where = Text(f"measured on {report.measured_on}") if report.measured_on else None  # a foreign trace's own words
    return Panel(
        Group(Text("\n".join(lines)), *parts, advice), title=title, subtitle=where, border_style=colour, expand=False
    )


def _overview(report: Report) -> str:
    batches = f"{report.batches} batches in {report.seconds:.3f} s, {report.throughput:.1f} per second"
    lines = [batches if report.batches else f"{report.seconds:.3f} s; the trace does not tell batches apart"]
    if report.truncated:
        lines.append("Only this last part of the run was recorded: a trace keeps the newest spans of each thread.")
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
