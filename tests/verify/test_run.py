"""`python -m lightning_hpu_infer verify`, as people call it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lightning_hpu_infer.cli import main
from lightning_hpu_infer.verify.catalogue import checks
from lightning_hpu_infer.verify.check import Kind, Mode, Result, Verdict
from lightning_hpu_infer.verify.render import render
from lightning_hpu_infer.verify.report import VerifyReport

COMMAND = [sys.executable, "-m", "lightning_hpu_infer", "verify", "--output", "found.json"]
ROOT = Path(__file__).parents[2]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *options],
        cwd=folder,
        env=os.environ | {"LIGHTNING_HPU_INFER_EMULATOR": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["lazy", pytest.param("eager", marks=pytest.mark.full)])
def test_verify_on_the_emulator(mode: Mode, tmp_path: Path) -> None:
    process = start(tmp_path, "--quick", "--mode", mode)
    try:
        output, progress = process.communicate(timeout=390)
    finally:
        process.kill()
    found = json.loads((tmp_path / "found.json").read_text())
    assert [each for each in found["results"] if each["verdict"] != "held"] == []
    assert process.returncode == 0, progress
    expected = [check.id for check in checks(mode, quick=True)]
    assert [f"{each['kind']}: {each['name']}" for each in found["results"]] == expected
    assert progress.count(" held ") == len(expected)
    assert found["verdicts"] == {"held": len(expected), "broken": 0, "not tried": 0}
    assert found["emulated"]
    assert found["diagnoses"][mode]["facts"]["lazy"] is (mode == "lazy")
    assert "on the emulator" in output
    assert "found.json" in output


def test_what_was_found_before_an_interrupt_is_kept(tmp_path: Path) -> None:
    process = start(tmp_path, "--mode", "lazy")
    try:
        assert process.stderr is not None
        assert "mode is as asked" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["interrupted"]
    assert found["results"][0]["name"] == "mode is as asked"


def test_without_an_hpu_there_is_nothing_to_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify"]) == 2
    assert "LIGHTNING_HPU_INFER_EMULATOR=1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("emulated")
def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--output", str(tmp_path / "nowhere" / "found.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def report(**verdicts: Verdict) -> VerifyReport:
    results = [
        Result(
            mode="lazy",
            kind=Kind.ASSUMPTION,
            name=name,
            verdict=verdict,
            seen=f"what {name} did",
            turns_off="Set `hpu_graphs=False`." if verdict == Verdict.BROKEN else "",
        )
        for name, verdict in verdicts.items()
    ]
    return VerifyReport(version="1.2.3", date="2026-01-31T00:00:00", modes=("lazy",), results=results)


def printed(found: VerifyReport) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(render(found))
        return console.export_text()


def test_a_report_says_what_is_broken_and_what_to_set() -> None:
    broken = report(one=Verdict.HELD, other=Verdict.BROKEN, third=Verdict.NOT_TRIED)
    assert broken.exit_code == 1
    text = printed(broken)
    for part in ("1 of 3 checks are broken", "what other did", "→ Set `hpu_graphs=False`.", "what third did"):
        assert part in text
    assert "what one did" not in text
    held = report(one=Verdict.HELD)
    assert held.exit_code == 0
    assert "Nothing is broken" in printed(held)


def test_the_file_has_what_a_maintainer_asks_for() -> None:
    facts: dict[str, Any] = {"emulated": False, "device_count": 8, "device_name": "GAUDI2", "lazy": True}
    found = report(one=Verdict.BROKEN)
    found.diagnoses = {"lazy": {"facts": facts}}
    written = json.loads(found.to_json())
    assert written["device"] == "GAUDI2"
    assert written["verdicts"] == {"held": 0, "broken": 1, "not tried": 0}
    assert written["results"][0]["seen"] == "what one did"
    assert {"name", "statement", "source", "turns_off", "modes"} == set(written["assumptions"][0])
