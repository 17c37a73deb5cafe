"""Programs in processes of their own, and failing ones reduced to the choices that matter."""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.program import Program
from tests.fuzz.run import KINDS, failures

SECONDS = 60.0
"""How long a program may take."""


def failures_apart(program: Program, kinds: Collection[str] = KINDS, seconds: float = SECONDS) -> dict[str, str]:
    """`failures` in a forked process, so that no program sees another's traces; a crash or a hang is one too."""
    with TemporaryDirectory() as folder:
        result, errors = Path(folder, "result"), Path(folder, "errors")
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _child(program, kinds, result, errors)
        return _awaited(child, result, errors, seconds)


def _child(program: Program, kinds: Collection[str], result: Path, errors: Path) -> None:
    code = 1
    try:
        with errors.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            found = failures(program, kinds)
        result.write_bytes(pickle.dumps(found))
        code = 0
    except BaseException:
        result.write_bytes(pickle.dumps({"crash": traceback.format_exc()[-3000:]}))
    finally:
        os._exit(code)


def _awaited(child: int, result: Path, errors: Path, seconds: float) -> dict[str, str]:
    end, ended = time.monotonic() + seconds, 0
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return {"hang": f"no end in {seconds:.0f} s: {errors.read_text()[-1000:]}"}
    if not result.exists():
        return {"crash": f"status {status}: {errors.read_text()[-1000:]}"}
    found: dict[str, str] = pickle.loads(result.read_bytes())
    return found


Fails = Callable[[Program, Collection[str]], dict[str, str]]


def shrunk(program: Program, kind: str, fails: Fails = failures_apart, seconds: float = 120.0) -> Program:
    """The program without the choices that its failure does not need: many at a time, then one by one.

    Args:
        program: One that fails.
        kind: Where it fails.
        fails: Gives the failures of a program.
        seconds: How long to try.
    """
    end, size = time.monotonic() + seconds, len(program.names())
    while size and time.monotonic() < end:
        names = program.names()
        groups = [names[start : start + size] for start in range(0, len(names), size)]
        candidates = [simpler for simpler in map(program.without, groups) if simpler != program]
        smaller = next((simpler for simpler in candidates if kind in fails(simpler, {kind})), None)
        if smaller is None:
            size //= 2
        else:
            program, size = smaller, min(size, max(1, len(smaller.names()) // 2))
    return program
