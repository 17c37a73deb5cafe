"""Runs of `predict_on_devices.py` in processes of its own, and what they predicted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.helpers import Net, Rows, predict


def environment() -> dict[str, str]:
    """Our environment, in which a script finds this checkout, and nothing of ranks."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "LOCAL_"))}
    # Its folders may be relative to ours.
    search = [os.path.abspath(each) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    return found | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *search])}


def launch(folder: Path, *arguments: str, command: Sequence[str] = (sys.executable,)) -> tuple[int, str]:
    """Run `predict_on_devices.py` in a folder; returns exit code and output.

    Its whole process group is ended if it hangs.
    """
    script = Path(__file__).with_name("predict_on_devices.py")
    return run_script(script, folder, *arguments, command=command)


def run_script(
    script: Path, folder: Path, *arguments: str, command: Sequence[str] = (sys.executable,)
) -> tuple[int, str]:
    """The same for any script whose first argument is the folder."""
    process = subprocess.Popen(
        [*command, str(script), str(folder), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=folder,
    )
    try:
        output, _ = process.communicate(timeout=110)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def check(ranks: list[dict[str, Any]]) -> None:
    """Every sample is predicted exactly once, under its index in the dataset."""
    expected = [row for batch in predict("cpu", Net(), DataLoader(Rows(23), 23)) for row in batch.tolist()]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    found: dict[int, list[float]] = {}
    for rank in ranks:
        assert rank["written"] == rank["predictions"]
        for indices, batch in zip(rank["indices"], rank["predictions"], strict=True):
            for index, row in zip(indices, batch, strict=True):
                assert index not in found
                found[index] = row
    assert sorted(found) == list(range(23))
    for index, row in found.items():
        assert row == pytest.approx(expected[index], rel=1e-5)
