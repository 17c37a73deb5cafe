"""Crashes and hangs of the process that checks are verdicts, and the rest goes on."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_hpu_infer.verify import supervise as supervising
from lightning_hpu_infer.verify.channel import Job
from lightning_hpu_infer.verify.check import Result, Verdict
from lightning_hpu_infer.verify.supervise import Command, contract_command, supervise

# Like `child`, but at once: runs the checks a, b and c, of which b is what it is told to be.
SCRIPT = """
import json, os, signal, sys, time
job, b = json.loads(sys.argv[1]), sys.argv[2]
def send(**message):
    os.write(job["fd"], (json.dumps(message) + "\\n").encode())
print("begins", os.environ["PT_HPU_LAZY_MODE"], flush=True)
if b == "no start":
    sys.exit(3)
send(diagnosis={"pid": os.getpid()})
for name in "abc":
    if f"change: {name}" in job["skip"]:
        continue
    send(started=f"change: {name}")
    if name == "b" and b == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "b" and b == "wait":
        time.sleep(1000)
    if name == "b" and b == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    send(result={"mode": job["mode"], "kind": "change", "name": name, "verdict": "held"})
    if name == "b" and b == "stop":
        sys.exit(0)
send(end=True)
"""
JOB = Job(mode="eager", seconds=60)


def command(b: str) -> Command:
    return lambda job: ([sys.executable, "-c", SCRIPT, job.to_json(), b], dict(os.environ))


def verdicts(b: str, job: Job = JOB) -> dict[str, tuple[Verdict, str]]:
    found = [each for each in supervise(job, command(b)) if isinstance(each, Result)]
    assert len({each.id for each in found}) == len(found)
    return {each.name: (each.verdict, each.seen) for each in found}


HELD = (Verdict.HELD, "")


def test_a_process_that_ends_well() -> None:
    assert verdicts("held") == {"a": HELD, "b": HELD, "c": HELD}


def test_a_crash_is_a_verdict_and_the_rest_goes_on() -> None:
    assert verdicts("crash") == {"a": HELD, "b": (Verdict.BROKEN, "its process was ended by SIGSEGV"), "c": HELD}


def test_a_hang_is_a_verdict_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "_GRACE", 0.5)
    monkeypatch.setattr(supervising, "_PATIENCE", ((signal.SIGKILL, 30.0),))
    found = verdicts("hang", Job(mode="lazy", seconds=0.5))
    assert found == {"a": HELD, "b": (Verdict.BROKEN, "its process did not end within 0 s"), "c": HELD}


def test_a_process_may_leave_the_rest_to_another() -> None:
    assert verdicts("stop") == {"a": HELD, "b": HELD, "c": HELD}


def test_a_process_that_does_not_begin_is_a_verdict() -> None:
    (found,) = supervise(JOB, command("no start"))
    assert isinstance(found, Result)
    assert (found.id, found.verdict) == ("process: begins", Verdict.BROKEN)
    assert found.seen == "its process ended with exit code 3"
    assert found.details == "begins 0\n"


def test_a_process_ends_with_the_one_that_waits() -> None:
    messages = supervise(JOB, command("wait"))
    first: Any = next(messages)
    assert isinstance(next(messages), Result)
    messages.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(first["pid"], 0)


SUITE = """
import os, signal
import pytest

def test_passes(): ...
def test_fails(): assert 1 == 2
def test_crashes(): os.kill(os.getpid(), signal.SIGABRT)
def test_is_skipped(): pytest.skip("not here")
"""


def test_tests_of_the_contract_suite_are_checks(tmp_path: Path) -> None:
    (tmp_path / "test_bridge.py").write_text(SUITE)
    (tmp_path / "test_not_python.py").write_text("(")
    found: list[Any] = list(supervise(JOB, contract_command(tmp_path)))
    seen = {each.name.rpartition("::")[2]: (each.verdict.value, each.seen) for each in found}
    assert seen["test_passes"] == ("held", "")
    assert seen["test_fails"] == ("broken", "assert 1 == 2")
    assert seen["test_crashes"] == ("broken", "its process was ended by SIGABRT")
    assert seen["test_is_skipped"] == ("not tried", "not here")
    assert sum(each.verdict == Verdict.BROKEN for each in found) == 3
