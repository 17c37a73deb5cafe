"""A pytest plugin that reports each test of the contract suite: `pytest -p lightning_hpu_infer.verify.contract`."""

import json
import os
from contextlib import ExitStack
from typing import Any

from lightning_hpu_infer.verify.channel import Channel, Job
from lightning_hpu_infer.verify.check import Kind, Result, Verdict

JOB = "LIGHTNING_HPU_INFER_VERIFY_JOB"
"""The variable with the job."""
_REMEDY = "Report it: the emulator, and with it our tests, may be wrong there."


class Reporter:
    """Sends a result per test.

    Args:
        job: Its mode and descriptor are used.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._channel = job, Channel(job)
        self._running = ExitStack()
        self._worst: Any = None
        self._seconds = 0.0

    def pytest_collectreport(self, report: Any) -> None:
        """Report a file that cannot be collected."""
        if report.failed and f"{Kind.CONTRACT.value}: {report.nodeid}" not in self._job.skip:
            self._worst = report
            self._send(report.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note that a test begins."""
        self._worst, self._seconds = None, 0.0
        self._running.enter_context(self._channel.running(f"{Kind.CONTRACT.value}: {nodeid}"))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note how a test's set-up, call and tear-down ended."""
        self._seconds += report.duration
        if report.failed or (report.skipped and self._worst is None):
            self._worst = report

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Report a test."""
        self._running.close()
        self._send(nodeid)

    def pytest_sessionfinish(self) -> None:
        """Report the end."""
        self._channel.send(end=True)

    def _send(self, name: str) -> None:
        report = self._worst
        verdict = Verdict.HELD if report is None else Verdict.BROKEN if report.failed else Verdict.NOT_TRIED
        broken = verdict == Verdict.BROKEN
        self._channel.result(
            Result(
                mode=self._job.mode,
                kind=Kind.CONTRACT,
                name=name,
                verdict=verdict,
                seen="" if report is None else _summary(report)[:500],
                turns_off=_REMEDY if broken else "",
                seconds=round(self._seconds, 3),
                details=report.longreprtext[-3000:] if broken else "",
            )
        )


def _summary(report: Any) -> str:
    """Why a test was skipped, or the first line of its error."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    lines = str(report.longreprtext).strip().splitlines()
    errors = (line[1:].strip() for line in lines if line.startswith("E "))
    return next(errors, "".join(lines[-1:]))


def pytest_configure(config: Any) -> None:
    """Register the reporter where there is a job."""
    if JOB in os.environ:
        config.pluginmanager.register(Reporter(Job(**json.loads(os.environ[JOB]))))
