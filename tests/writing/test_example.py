"""examples/write_and_resume.py: the process that it starts is killed, and the rest is predicted here."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from examples import write_and_resume
from tests.parity.processes import environment


def test_the_example_goes_on_after_a_kill(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("lightning.pytorch")
    caplog.set_level(logger.level, logger.name)  # the example changes it, and the fixture restores what it was
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setattr(sys, "argv", ["write_and_resume.py", "--out", str(tmp_path / "out")])
    write_and_resume.main()
    killed, again, found = capsys.readouterr().out.splitlines()
    count = int(killed.removeprefix("killed: ").split()[0])
    assert 0 < count < write_and_resume.SAMPLES
    assert again == f"again: {2000 - count} samples were loaded, {count} were not predicted again"
    assert found.endswith("each sample once: index, dataloader_idx, logits, label")


def test_the_job_for_slurm_is_a_script() -> None:
    job = Path(write_and_resume.__file__).with_name("slurm.sh")
    subprocess.run(["bash", "-n", str(job)], check=True)
    assert job.stat().st_mode & 0o111
