"""A report of `verify` as rich draws it: `rich.print(render(report))`."""

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_hpu_infer.verify.check import Kind, Mode, Result, Verdict
from lightning_hpu_infer.verify.report import VerifyReport, counted

_MARKS = {Verdict.HELD: ("✓", "green"), Verdict.BROKEN: ("✗", "red"), Verdict.NOT_TRIED: ("-", "yellow")}
_TITLES = {
    Kind.TECHNIQUE: "predictions with a technique on",
    Kind.CHANGE: "predictions around a change",
    Kind.CONTRACT: "tests of the contract suite",
    Kind.TIMING: "runs that were timed",
    Kind.PROCESS: "processes that begin",
}


def render(report: VerifyReport) -> RenderableType:
    """A panel: the assumptions, counts of the rest, timings, and what is broken with what to set."""
    parts: list[RenderableType] = []
    if any(result.kind == Kind.ASSUMPTION for result in report.results):
        parts.append(_assumptions(report))
    if any(result.kind != Kind.ASSUMPTION for result in report.results):
        parts.append(_counts(report))
    for result in report.results:
        if result.kind == Kind.TIMING and result.verdict == Verdict.HELD:
            emulated = ", emulated" if report.emulated else ""
            parts.append(Text(f"{result.mode}{emulated}, {result.name}: {result.seen}"))
    parts += _listed("Not tried", (each for each in report.found(Verdict.NOT_TRIED) if each.kind != Kind.CONTRACT))
    parts += _listed("Broken", report.found(Verdict.BROKEN))
    broken = len(report.found(Verdict.BROKEN))
    title = f"{broken} of {len(report.results)} checks are broken" if broken else "Nothing is broken"
    title += ", but it was interrupted" if report.interrupted else ""
    colour = "red" if broken else "yellow" if report.interrupted else "green"
    return Panel(
        Group(*parts),
        title=Text(title, style=f"bold {colour}"),
        subtitle=Text(f"on {report.device}"),
        border_style=colour,
        expand=False,
    )


def _mark(verdict: Verdict | None) -> Text:
    if verdict is None:
        return Text()
    mark, colour = _MARKS[verdict]
    return Text(f"{mark} {verdict.value}", style=colour)


def _assumptions(report: VerifyReport) -> Table:
    table = Table("What is assumed of the bridge", *report.modes, box=box.SIMPLE_HEAD, pad_edge=False)
    found: dict[str, dict[Mode, Verdict]] = {}
    for result in report.results:
        if result.kind == Kind.ASSUMPTION:
            found.setdefault(result.name, {})[result.mode] = result.verdict
    for name, verdicts in found.items():
        table.add_row(name, *(_mark(verdicts.get(mode)) for mode in report.modes))
    return table


def _counts(report: VerifyReport) -> Table:
    table = Table("mode", "checks", *(verdict.value for verdict in Verdict), box=box.SIMPLE_HEAD, pad_edge=False)
    for mode in report.modes:
        for kind, title in _TITLES.items():
            results = [each for each in report.results if (each.mode, each.kind) == (mode, kind)]
            if results:
                table.add_row(mode, title, *map(str, counted(results).values()))
    return table


def _listed(title: str, results: Iterable[Result]) -> list[RenderableType]:
    table = Table(box=None, show_header=False, pad_edge=False)
    for result in results:
        mark, colour = _MARKS[result.verdict]
        table.add_row(Text(mark, style=colour), Text(f"{result.mode}, {result.id}: {result.seen}"))
        if result.turns_off:
            table.add_row("", Text(f"→ {result.turns_off}", style=colour))
    return [Text(f"\n{title}", style="bold"), table] if table.rows else []
