"""Starts the processes that check, and outlives their crashes and hangs."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from lightning_hpu_infer.verify.channel import Job, to_result
from lightning_hpu_infer.verify.check import Kind, Result, Verdict
from lightning_hpu_infer.verify.contract import JOB

# A process that hangs ends itself after `Job.seconds`. One that cannot, or that hangs outside of a check, is ended.
_GRACE = 120.0
_TAIL = 4000
_PATIENCE = ((signal.SIGTERM, 10.0), (signal.SIGKILL, 30.0))
"""Signals that end a process, and seconds after each."""

Command = Callable[[Job], tuple[list[str], dict[str, str]]]
"""Arguments and variables, from a job."""
Message = dict[str, Any] | Result
"""A diagnosis as JSON, or a result."""


def checks_command(job: Job) -> tuple[list[str], dict[str, str]]:
    """How to run the checks of the catalogue."""
    return [sys.executable, "-m", "lightning_hpu_infer.verify.child", job.to_json()], dict(os.environ)


def contract_command(folder: Path) -> Command:
    """How to run the contract suite.

    Args:
        folder: `tests/contract` of a checkout, whose root has to be the working directory.
    """

    def command(job: Job) -> tuple[list[str], dict[str, str]]:
        # Not the checkout's settings: there, warnings are errors, also the bridge's.
        options = ["-q", "-p", "lightning_hpu_infer.verify.contract", "-p", "no:cacheprovider", "--capture=sys"]
        options += ["-c", os.devnull, "--rootdir", os.getcwd(), "-W", "ignore", "--continue-on-collection-errors"]
        skip = [f"--deselect={name.partition(': ')[2]}" for name in job.skip]
        # The tests install the emulator themselves where there is no bridge.
        environment = {name: value for name, value in os.environ.items() if name != "LIGHTNING_HPU_INFER_EMULATOR"}
        return [sys.executable, "-m", "pytest", *options, *skip, str(folder)], environment | {JOB: job.to_json()}

    return command


def supervise(job: Job, command: Command) -> Iterator[Message]:
    """Run a job, in as many processes as it takes. A check in which one ends is broken, and the next goes on after it.

    Args:
        job: What to do.
        command: How to start a process that does it.

    Yields:
        What the processes find, in order. The first is their diagnosis, if they make one.
    """
    while True:
        started, done = "", list[str]()
        with _Process(job, command) as process:
            for message in process.messages():
                if "end" in message:
                    return
                if "started" in message:
                    started = message["started"]
                elif "result" in message:
                    result = to_result(message["result"])
                    done.append(result.id)
                    started = ""
                    yield result
                else:
                    yield message["diagnosis"]
            how, tail, failed = process.how_it_ended(), process.tail(), bool(process.wait())
        if started:
            yield _ended(job, started, how, tail)
            done.append(started)
        elif failed and not done:
            yield _ended(job, f"{Kind.PROCESS.value}: begins", how, tail)
        if not done:
            return
        job = replace(job, skip=[*job.skip, *done])


def _ended(job: Job, name: str, how: str, tail: str) -> Result:
    kind, _, name = name.partition(": ")
    return Result(
        mode=job.mode,
        kind=Kind(kind),
        name=name,
        verdict=Verdict.BROKEN,
        seen=f"its process {how}",
        turns_off=f"Report it: this ends a process in {job.mode} mode.",
        details=tail,
    )


class _Process:
    """A process that does a job, in a group of its own; all of it is ended with the context."""

    def __init__(self, job: Job, command: Command) -> None:
        self._job, self._command = job, command
        self._hung = False

    def __enter__(self) -> "_Process":
        self._output: IO[bytes] = tempfile.TemporaryFile()
        self._read, write = os.pipe()
        try:
            arguments, environment = self._command(replace(self._job, fd=write))
            self._popen = subprocess.Popen(
                arguments,
                env=environment | {"PT_HPU_LAZY_MODE": str(int(self._job.mode == "lazy"))},
                pass_fds=[write],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(write)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._read)
        self._end()
        self._output.close()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it sends, until it ends, or is silent for too long and is ended."""
        rest, silent_until = b"", self._patience()
        while True:
            if not select.select([self._read], [], [], max(0.0, silent_until - time.monotonic()))[0]:
                self._hung = True
                self._end()
                return
            read = os.read(self._read, 65536)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                yield json.loads(line)
            silent_until = self._patience()

    def _patience(self) -> float:
        return time.monotonic() + self._job.seconds + _GRACE

    def wait(self) -> int:
        """Its exit code."""
        try:
            return self._popen.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._hung = True
            self._end()
            return self._popen.wait()

    def how_it_ended(self) -> str:
        """In words."""
        code = self.wait()
        if self._hung or "Timeout (" in self.tail():  # what faulthandler prints first
            return f"did not end within {self._job.seconds:.0f} s"
        with suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def tail(self) -> str:
        """The end of what it printed."""
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _TAIL))
        return self._output.read().decode(errors="replace")

    def _end(self) -> None:
        """End the whole group: gently first, so that a driver can let go of the device."""
        for number, seconds in _PATIENCE:
            if self._popen.poll() is not None:
                return
            with suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(seconds)
