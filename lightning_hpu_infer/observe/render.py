"""A report as rich draws it: `rich.print(render(report))`."""

from operator import itemgetter

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_hpu_infer.observe.report import Report, Severity, label_of

_MIN_SHARE = 0.005
_MAX_REASONS = 3
_COLOURS = {Severity.NONE: "green", Severity.MODERATE: "yellow", Severity.HIGH: "red"}


def render(report: Report) -> RenderableType:
    """A panel: verdict, overview, causes, stages, and what to change next."""
    causes = _table("The device was idle for" if report.device else "The main thread was in", "seconds", "share")
    for cause in report.causes:
        if cause.share >= _MIN_SHARE:
            causes.add_row(label_of(cause.stage), f"{cause.seconds:.3f}", f"{cause.share:.1%}")
    stages = _table("Stage", "lane", "seconds", "of the run", "ms each", "GB/s")
    for time in report.stages:
        stages.add_row(
            time.stage.value,
            time.lane.value,
            f"{time.seconds:.3f}",
            f"{time.seconds / (report.seconds or 1):.1%}",
            f"{time.seconds / time.spans * 1e3:.3f}",
            f"{time.nbytes / time.seconds / 1e9:.2f}" if time.nbytes and time.seconds else "",
        )
    advice = Text.assemble(("Next: ", "bold"), report.advice)
    colour = _COLOURS[report.severity]
    return Panel(
        Group(Text("\n".join(_overview(report))), *([causes] if causes.rows else []), stages, advice),
        title=Text(report.summary, style=f"bold {colour}"),
        subtitle=Text(f"measured on {report.measured_on}") if report.measured_on else None,
        border_style=colour,
        expand=False,
    )


def _table(*columns: str) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _overview(report: Report) -> list[str]:
    device, counters = report.device, report.counters
    lines = [f"{report.batches} batches in {report.seconds:.3f} s, {report.throughput:.1f} per second"]
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
        lines += [f"  without a graph, {times} times: {reason}" for reason, times in reasons[:_MAX_REASONS]]
    if counters.padded_elements:
        lines.append(f"padding: {counters.padding_waste:.0%} of the inputs")
    return [*lines, *report.tuning]
