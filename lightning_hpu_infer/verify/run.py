"""One command for the day a Gaudi is there: all checks, in each mode, into one file."""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lightning_hpu_infer import _habana
from lightning_hpu_infer.verify.catalogue import check_patterns
from lightning_hpu_infer.verify.channel import Job
from lightning_hpu_infer.verify.check import MODES, Kind, Mode, Result, Verdict
from lightning_hpu_infer.verify.report import VerifyReport
from lightning_hpu_infer.verify.supervise import Command, checks_command, contract_command, supervise

NO_HPU = (
    "There is no HPU here. On a Gaudi, use the Python of its image, and ask `python -m lightning_hpu_infer doctor`."
    " To see what this command does, emulate one: LIGHTNING_HPU_INFER_EMULATOR=1 in the environment (PyTorch 2.10 or"
    " newer)."
)


class NoHPU(OSError):
    """Raised where there is nothing to verify."""


def verify(
    output: Path,
    *,
    modes: Sequence[Mode] = MODES,
    quick: bool = False,
    only: Sequence[str] = (),
    contract: Path | None = None,
    seconds: float = 300.0,
    say: Callable[[Result], None] = lambda result: None,
) -> VerifyReport:
    """Check what the plugin assumes of the device, what it predicts there, and how fast.

    Each mode has a process of its own. This one does not open the device. The file is written after each check, so that
    nothing is lost whatever happens. Ctrl-C ends what runs, and the report says so.

    Args:
        output: The file.
        modes: The bridge's modes to try.
        quick: All assumptions, and a few of the other checks.
        only: Parts of names of checks, or patterns with `*`; empty for all.
        contract: The folder of the contract suite, to run that too; None leaves it out.
        seconds: What a single check may take.
        say: Called with each result.

    Raises:
        NoHPU: If there is no HPU, real or emulated.
        ValueError: If there is no check by one of the names.
    """
    check_patterns(only)
    if not _habana.is_installed():
        raise NoHPU(NO_HPU)
    report = VerifyReport(
        version=_version(),
        date=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        modes=tuple(modes),
        quick=quick,
        only=tuple(only),
    )
    report.write(output)  # tells now if it cannot be written
    try:
        for mode in modes:
            job = Job(mode=mode, seconds=seconds, quick=quick, only=list(only))
            _run(report, job, checks_command, output, say)
            if contract is not None and _has_device(report, mode):
                _run(report, job, contract_command(contract), output, say)
    except KeyboardInterrupt:
        report.interrupted = True
        report.write(output)
    if not report.interrupted and report.diagnoses and not any(_has_device(report, mode) for mode in modes):
        output.unlink()
        raise NoHPU(NO_HPU)
    return report


def _version() -> str:
    try:
        return version("lightning-hpu-infer")
    except PackageNotFoundError:  # importable, but not installed
        return "unknown"


def _run(report: VerifyReport, job: Job, command: Command, output: Path, say: Callable[[Result], None]) -> None:
    for message in supervise(job, command):
        if isinstance(message, Result):
            report.results.append(message)
            say(message)
        else:
            report.diagnoses[job.mode] = message
            if not _has_device(report, job.mode):
                report.results.append(_impossible(report, job.mode))
                say(report.results[-1])
        report.write(output)


def _has_device(report: VerifyReport, mode: Mode) -> bool:
    """Whether the checks of a mode could run."""
    facts = report.diagnoses.get(mode, {}).get("facts", {})
    return bool(facts.get("device_count")) and not facts["error"] and facts["lazy"] == (mode == "lazy")


def _impossible(report: VerifyReport, mode: Mode) -> Result:
    diagnosis = report.diagnoses[mode]
    errors = [finding["text"] for finding in diagnosis["findings"] if finding["level"] == "error"]
    reason = (errors or [f"the bridge is not in {mode} mode"])[0]
    return Result(mode=mode, kind=Kind.PROCESS, name="begins", verdict=Verdict.NOT_TRIED, seen=reason)
