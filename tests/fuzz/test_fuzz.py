"""Random programs behave on the plugin as on stock Lightning, hooks, faults and second runs included."""

import subprocess
import sys
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import pytest

from tests.fuzz.program import Program, drawn
from tests.fuzz.shrink import shrunk

ROOT = Path(__file__).parents[2]


def fuzz(seconds: int, *arguments: str) -> str:
    """What `python -m tests.fuzz` says of programs that fail: it needs a process without threads."""
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(seconds), *arguments]
    # What fails is shrunk when the time is up.
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds + 500, check=False)
    assert "programs from seed" in run.stdout, run.stderr
    return run.stdout if run.returncode else ""


@pytest.mark.timeout(600)
def test_rule_1_random_programs_for_25_seconds() -> None:
    assert fuzz(25) == ""


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_rule_1_random_programs_for_10_minutes() -> None:
    assert fuzz(600, "--seed", "100000") == ""


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_rule_1_every_choice_by_itself() -> None:
    assert fuzz(600, "--each") == ""


def test_a_seed_always_gives_the_same_sensible_program() -> None:
    programs = [drawn(seed) for seed in range(300)]
    assert [program.sensible() for program in programs] == programs
    assert [drawn(seed) for seed in range(300)] == programs
    for each in fields(Program):
        if each.name != "flags":
            assert {getattr(program, each.name) for program in programs} == set(each.metadata["values"]), each.name


def test_a_program_is_printed_as_the_call_that_makes_it() -> None:
    program = drawn(7)
    assert eval(repr(program)) == program


def test_a_failing_program_is_shrunk_to_what_matters() -> None:
    def fails(program: Program, kinds: Collection[str]) -> dict[str, str]:
        guilty = program.hook == "end_weights" and program.flags.get("in_flight") == 3
        return {"on": "wrong"} if guilty else {}

    program = Program(
        network="lstm", step="item", output="rows", hook="end_weights", at=2, flags={"in_flight": 3, "prefetch": 4}
    )
    assert shrunk(program, "on", fails) == Program(hook="end_weights", flags={"in_flight": 3})
