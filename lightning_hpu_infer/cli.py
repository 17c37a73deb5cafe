"""The command line: each command parses, calls one function of the library, and prints."""

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lightning_hpu_infer.doctor import examine, gather_facts
from lightning_hpu_infer.observe import timeline as plots
from lightning_hpu_infer.observe.profiler import diagnose
from lightning_hpu_infer.observe.render import render
from lightning_hpu_infer.verify.check import MODES, Kind, Result, Verdict
from lightning_hpu_infer.verify.render import render as render_verify
from lightning_hpu_infer.verify.run import verify
from lightning_hpu_infer.writing import check_pyarrow

_USAGE_ERROR = 2
_INTERRUPTED = 130
_ATTACH = (
    "Read it, take out what is private, and attach it to an issue:"
    " https://github.com/lightning-hpu-infer/lightning-hpu-infer/issues"
)


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
    command = commands.add_parser("verify", help="whether what the plugin assumes is true of the HPU that is here")
    command.add_argument("--mode", choices=(*MODES, "both"), default="both", help="the bridge's mode; both by default")
    command.add_argument("--quick", action="store_true", help="all assumptions, and a few of the other checks")
    command.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="part of the name of checks to run; repeatable"
    )
    command.add_argument("--seconds", type=float, default=300.0, help="what one check may take; 300 by default")
    command.add_argument("--contract", type=Path, metavar="FOLDER", help="run these tests of the bridge too (pytest)")
    command.add_argument("--output", type=Path, metavar="FILE", help="default: lightning_hpu_infer-verify-DATE.json")
    command.set_defaults(run=_verify)
    command = commands.add_parser(
        "predictions", help="what is in a folder of predictions; exit code 1 if it is incomplete or broken"
    )
    command.add_argument("path", metavar="PATH", help="local folder or URI that a PredictionWriter was given")
    command.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_predictions)
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


def _verify(options: argparse.Namespace) -> int:
    output = options.output or Path(time.strftime("lightning_hpu_infer-verify-%Y-%m-%d-%H%M%S.json"))
    report = verify(
        output,
        modes=MODES if options.mode == "both" else (options.mode,),
        quick=options.quick,
        only=options.only,
        contract=options.contract,
        seconds=options.seconds,
        say=_say,
    )
    Console().print(render_verify(report))
    Console(soft_wrap=True).print(f"All of it is in {output}. {_ATTACH}", markup=False, highlight=False)
    return _INTERRUPTED if report.interrupted else report.exit_code


def _predictions(options: argparse.Namespace) -> int:
    check_pyarrow()
    from lightning_hpu_infer.writing.describe import describe

    description = describe(options.path, verify=options.verify)
    sys.stdout.write(f"{description.to_json() if options.json else description}\n")
    return 0 if description.sound else 1


def _say(result: Result) -> None:
    if result.kind == Kind.CONTRACT and result.verdict == Verdict.NOT_TRIED:
        return  # half of them are about the other mode
    _complain(f"{result.mode:5} {result.verdict.value:9} {result.seconds:6.1f} s  {result.id}")
