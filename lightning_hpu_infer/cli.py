"""The command line: each command parses, calls one function of the library, and prints."""

import argparse
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lightning_hpu_infer.doctor import examine, gather_facts
from lightning_hpu_infer.observe import timeline as plots
from lightning_hpu_infer.observe.profiler import diagnose
from lightning_hpu_infer.observe.render import render

_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for mistakes of the user's, 130 if interrupted.

    Args:
        arguments: Those after the program's name; `sys.argv`'s by default.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (OSError, ValueError, ImportError) as error:
        _complain(f"error: {error}")
        return _USAGE_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED


def _complain(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lightning_hpu_infer", description="Fast trainer.predict on Intel Gaudi."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("diagnose", help="what limited a run that was traced, and what to change next")
    command.add_argument(
        "trace", help="trace.json of a traced run, or a Chrome trace of torch.profiler (CPU, CUDA, HPU); .gz too"
    )
    command.add_argument("--plot", metavar="FILE", help="draw a timeline (.png, .svg, ...); needs matplotlib")
    command.add_argument("--first", type=int, metavar="BATCH", help="first of the six batches to draw")
    command.add_argument("--json", metavar="FILE", help="write the report as JSON; - for standard output")
    command.set_defaults(run=_diagnose)
    command = commands.add_parser("doctor", help="whether predict would run on an HPU, and what is in its way")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)
    return parser


@contextmanager
def _no_collections() -> Iterator[None]:
    """Large traces are millions of objects and no garbage: to look through them again and again is half of the work."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collections()
def _diagnose(options: argparse.Namespace) -> int:
    spans, report = diagnose(options.trace)
    if options.json == "-":
        sys.stdout.write(report.to_json() + "\n")
    else:
        Console().print(render(report))
    if options.json and options.json != "-":
        Path(options.json).write_text(report.to_json() + "\n")
    if options.plot:
        plots.timeline(spans, options.plot, first=options.first, title=report.summary)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    diagnosis = examine(gather_facts())
    if options.json:
        sys.stdout.write(diagnosis.to_json() + "\n")
    else:
        Console().print(diagnosis)
    return 0 if diagnosis.healthy else 1
