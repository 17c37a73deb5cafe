"""SIGTERM, as clusters send it before they take the machine away: what was launched is committed, and a run goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter
from tests.helpers import trainer
from tests.parity.processes import environment
from tests.writing.predicting import COUNT, Numbers, Scores, Stream, expected, predict, written

TERMINATED = 128 + signal.SIGTERM
SLURM = {f"SLURM_{name}": value for name, value in {"JOB_ID": "7", "JOB_NAME": "predict", "NTASKS": "1"}.items()}
SLURM |= {f"SLURM_{name}": "0" for name in ("PROCID", "LOCALID", "NODEID")}
SCRIPT = Path(__file__).with_name("terminated.py")


@pytest.fixture
def users() -> Iterator[list[int]]:
    """The signals that a handler of the user's has seen, which is in place again after a run."""
    seen: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)

    before = signal.signal(signal.SIGTERM, note)
    yield seen
    assert signal.signal(signal.SIGTERM, before) is note


class Terminated(Scores):
    """Gets the signal in a batch, after `PredictionWriter` has looked."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().on_predict_batch_start(batch, batch_idx)
        if batch_idx == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "flags",
    [{}, {"pipelining": False}, {"in_flight": 3, "postprocess": dict, "postprocess_workers": 2}],
    ids=str,
)
def test_what_was_launched_is_committed_and_the_run_goes_on(
    tmp_path: Path, flags: dict[str, Any], users: list[int]
) -> None:
    module = Terminated(2)
    with pytest.raises(SystemExit) as ended:
        predict(tmp_path, module, DataLoader(Numbers(), 4), **flags)
    assert ended.value.code == TERMINATED
    assert module.seen == [0, 1, 2]  # no later batch began
    assert users == [signal.SIGTERM]
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))[:12]
    numbers = Numbers()
    predict(tmp_path, Scores(), DataLoader(numbers, 5), **flags)
    assert set(numbers.loaded) == set(range(12, COUNT))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
def test_a_stream_goes_on_after_the_signal(tmp_path: Path, users: list[int]) -> None:
    with pytest.raises(SystemExit):
        predict(tmp_path, Terminated(2), DataLoader(Stream(), 4))
    module = Scores()
    predict(tmp_path, module, DataLoader(Stream(), 4))
    assert (module.seen, users) == ([3, 4, 5], [signal.SIGTERM])
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


def test_stock_loops_end_too(tmp_path: Path, users: list[int]) -> None:
    module = Terminated(2)
    with pytest.raises(SystemExit) as ended:
        trainer("cpu", [PredictionWriter(tmp_path)]).predict(module, DataLoader(Numbers(), 4))
    assert (ended.value.code, module.seen) == (TERMINATED, [0, 1, 2])
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))[:12]


def test_in_the_last_batch_the_signal_leaves_a_complete_run(tmp_path: Path, users: list[int]) -> None:
    predict(tmp_path, Terminated(5), DataLoader(Numbers(), 4))
    assert users == [signal.SIGTERM]
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


def test_without_a_writer_a_run_goes_on_as_in_stock_lightning(users: list[int]) -> None:
    module = Terminated(2)
    trainer(HPUInferenceAccelerator()).predict(module, DataLoader(Numbers(), 4))
    assert (module.seen, users) == ([0, 1, 2, 3, 4, 5], [signal.SIGTERM])


@pytest.mark.parametrize("slurm", [{}, pytest.param(SLURM, marks=pytest.mark.full)], ids=["plain", "slurm"])
def test_a_process_exits_as_clusters_expect_it_and_its_next_one_goes_on(tmp_path: Path, slurm: dict[str, str]) -> None:
    """A real signal from outside, without any handler of the user's."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out")]
    with subprocess.Popen(command, env=environment() | slurm, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "in batch 3\n"
            process.terminate()
            assert process.wait(60) == TERMINATED
        finally:
            process.kill()
    assert written(tmp_path / "out") == expected(DataLoader(Numbers(), 4))[:16]
    predict(tmp_path / "out", Scores(), DataLoader(Numbers(), 4))
    assert written(tmp_path / "out") == expected(DataLoader(Numbers(), 4))
