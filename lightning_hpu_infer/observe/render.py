"""A report as rich draws it: `rich.print(render(report))`."""

from io import StringIO
from operator import itemgetter

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_hpu_infer.observe.report import Report, Severity, label_of

_COLOURS = {Severity.NONE: "green", Severity.MODERATE: "yellow", Severity.HIGH: "red"}


def render(report: Report) -> RenderableType:
    """A panel: verdict, overview, causes, stages, and what to change next."""
    causes = _table("The device was idle for" if report.device else "The main thread was in", "seconds", "share")
    for cause in report.causes:
        if cause.share >= 0.0005:  # the table shows 0.1 %
            causes.add_row(label_of(cause.stage), f"{cause.seconds:.3f}", f"{cause.share:.1%}")
    stages = _table("Stage", "lane", "seconds", "of the run", "ms each", "GB/s")
    for time in report.stages:
        share, each = f"{time.seconds / (report.seconds or 1):.1%}", f"{time.seconds / time.spans * 1e3:.3f}"
        speed = f"{time.nbytes / time.seconds / 1e9:.2f}" if time.nbytes and time.seconds else ""
        stages.add_row(time.stage.value, time.lane.value, f"{time.seconds:.3f}", share, each, speed)
    parts: list[RenderableType] = [Text("\n".join(_overview(report))), *([causes] if causes.rows else []), stages]
    colour = _COLOURS[report.severity]
    return Panel(
        Group(*parts, Text.assemble(("Next: ", "bold"), report.advice)),
        title=Text(report.summary, style=f"bold {colour}"),
        subtitle=Text(f"measured on {report.measured_on}") if report.measured_on else None,
        border_style=colour,
        expand=False,
    )


def to_html(report: Report) -> str:
    """The same panel as a piece of HTML."""
    console = Console(file=StringIO(), record=True, width=120, force_jupyter=False)
    console.print(render(report))
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:normal">{code}</pre>')


def _table(*columns: str) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _overview(report: Report) -> list[str]:
    device, counters = report.device, report.counters
    lines = [f"{report.batches} batches in {report.seconds:.3f} s, {report.throughput:.1f} per second"]
    if report.error:
        lines.append(f"The run was ended early by {report.error}")
    if report.truncated:
        lines.append("Only this last part of the run was recorded: a trace keeps the newest spans of each thread.")
    if device is None:
        lines.append("The trace has no program of a device: the verdict rests on what the host did.")
    else:
        lines.append(
            f"device: busy {device.busy:.3f} s ({report.efficiency:.0%} of the run), idle {device.idle:.3f} s,"
            f" {device.before:.3f} s before its first program, {device.after:.3f} s after its last"
        )
    if counters.captures or counters.replays or counters.plain_calls:
        lines.append(
            f"graphs: {counters.captures} captures, {counters.replays} replays, {counters.plain_calls} plain calls,"
            f" {counters.evictions} evictions, {counters.verified} verified"
        )
        reasons = sorted(counters.plain_reasons.items(), key=itemgetter(1), reverse=True)
        lines += [f"  without a graph, {times} times: {reason}" for reason, times in reasons[:3]]
        lines += [f"  the step is cut there: {reason}" for reason in list(counters.breaks)[:3]]
    padding = [f"padding: {counters.padding_waste:.0%} of the inputs"] if counters.padded_elements else []
    return [*lines, *padding, *report.tuning]
