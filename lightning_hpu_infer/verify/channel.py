"""Messages from the process that checks to the one that waits for it, one line of JSON each."""

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_hpu_infer.verify.check import Kind, Mode, Result, Verdict


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process is to do."""

    mode: Mode
    seconds: float
    """What a single check may take, after which the process ends itself."""
    quick: bool = False
    only: list[str] = field(default_factory=list)
    """Parts of ids; empty for all checks."""
    skip: list[str] = field(default_factory=list)
    """Ids of checks that an earlier process has done."""
    fd: int = -1
    """The file descriptor to write messages to."""

    def to_json(self) -> str:
        """The job as an argument of a command."""
        return json.dumps(asdict(self))


class Channel:
    """Sends messages.

    Args:
        job: Its file descriptor is written to.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def send(self, **message: Any) -> None:
        """Send a message: one keyword with its value, which must be JSON."""
        os.write(self._job.fd, (json.dumps(message) + "\n").encode())

    def result(self, result: Result) -> None:
        """Send a check's result."""
        self.send(result=asdict(result))

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Say which check begins. If it takes too long, the stacks of all threads are printed and the process ends.

        Args:
            name: The check's id.
        """
        self.send(started=name)
        # `sys.stderr` may be captured.
        faulthandler.dump_traceback_later(self._job.seconds, exit=True, file=sys.__stderr__ or sys.stderr)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def to_result(fields: dict[str, Any]) -> Result:
    """A result that was sent."""
    return Result(**(fields | {"kind": Kind(fields["kind"]), "verdict": Verdict(fields["verdict"])}))
