"""Several ranks write to one folder: real processes under torchrun, killed, and gone on with by others."""

import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from lightning_hpu_infer.writing.describe import describe
from lightning_hpu_infer.writing.session import _isin_sorted
from tests.parity.processes import results, run_script
from tests.writing.predicting import Numbers, Scores, expected, predict, written
from tests.writing.ranked import COUNT

SCRIPT = Path(__file__).with_name("ranked.py")

pytestmark = pytest.mark.timeout(400)  # up to three launches, which have limits of their own


def run_two(folder: Path, *, torchrun: bool = True, **options: Any) -> tuple[int, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    if not torchrun:
        starter = [sys.executable]  # rank 0, which starts the other one
    for told in folder.glob("*.json"):
        told.unlink()
    return run_script(SCRIPT, folder, json.dumps({"on": "cpu", "size": 3} | options), command=starter)


def of_stock() -> list[tuple[int, int, float, list[float]]]:
    return expected(DataLoader(Numbers(COUNT), 4))


@pytest.mark.parametrize(
    ("on", "killed"),
    [
        ("cpu", 1),
        pytest.param("cpu", 0, marks=pytest.mark.full),
        pytest.param("emulator", 1, marks=pytest.mark.full),
        pytest.param("stock", 0, marks=pytest.mark.full),
    ],
)
def test_one_rank_is_killed_and_a_single_one_goes_on(tmp_path: Path, on: str, killed: int) -> None:
    code, output = run_two(tmp_path, on=on, killed=killed, writer={"rows_per_file": 3})
    assert code != 0
    found = written(tmp_path / "out")
    # The one that got SIGTERM has committed its third batch too; of the killed one, what was committed before.
    done = {index for _, index, *_ in found}
    assert {index for index in done if index % 2 != killed} == set(range(1 - killed, 18, 2)), output
    numbers = Numbers(COUNT)
    predict(tmp_path / "out", Scores(), DataLoader(numbers, 5))
    assert set(numbers.loaded) == set(range(COUNT)) - done
    assert written(tmp_path / "out") == of_stock()


@pytest.mark.full
@pytest.mark.parametrize("on", ["cpu", "emulator"])
def test_two_ranks_go_on_where_one_stopped_and_write_all_again_if_asked_to(tmp_path: Path, on: str) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        predict(tmp_path / "out", Scores(3), DataLoader(Numbers(COUNT), 4))
    code, output = run_two(tmp_path, on=on)
    assert code == 0, output
    one, two = results(tmp_path)
    assert sorted(one["loaded"] + two["loaded"]) == list(range(12, COUNT))
    assert one["device"] == ("hpu" if on == "emulator" else "cpu")
    assert written(tmp_path / "out") == of_stock()
    assert describe(tmp_path / "out").sound
    assert run_two(tmp_path, on=on)[0] == 0
    assert [rank["batches"] for rank in results(tmp_path)] == [0, 0]  # nothing was left
    code, output = run_two(tmp_path, on=on, writer={"overwrite": True})
    assert code == 0, output
    assert [rank["batches"] for rank in results(tmp_path)] == [7, 7]
    assert written(tmp_path / "out") == of_stock()


def test_a_rank_may_have_nothing_where_another_has_something() -> None:
    values, none = np.arange(3), np.empty(0, np.int64)
    assert _isin_sorted(values, none).tolist() == [False] * 3
    assert _isin_sorted(values, np.array([1, 5])).tolist() == [False, True, False]


@pytest.mark.full
def test_each_rank_goes_on_with_its_own_stream(tmp_path: Path) -> None:
    code, _ = run_two(tmp_path, stream=True, killed=1)
    assert code != 0
    code, output = run_two(tmp_path, stream=True)
    assert code == 0, output
    one, two = results(tmp_path)
    assert (one["batches"], two["batches"]) == (4, 6)  # of seven and six; the killed one has committed none
    rows = {row: scores for _, _, row, scores in of_stock()}
    streams = [range(0, COUNT, 2), range(1, COUNT - 8, 2)]
    # Numbers of samples: those of rank 0 are even, those of rank 1 odd.
    wanted = sorted((2 * i + rank, float(row)) for rank, each in enumerate(streams) for i, row in enumerate(each))
    assert written(tmp_path / "out") == [(0, number, row, rows[row]) for number, row in wanted]


@pytest.mark.full
@pytest.mark.parametrize(("torchrun", "exit_code"), [(True, 1), (False, 143)])
def test_on_sigterm_all_ranks_commit_what_they_have_launched(tmp_path: Path, torchrun: bool, exit_code: int) -> None:
    code, output = run_two(tmp_path, torchrun=torchrun, terminated=True)
    assert code == exit_code, output
    assert [index for _, index, *_ in written(tmp_path / "out")] == list(range(18))
    predict(tmp_path / "out", Scores(), DataLoader(Numbers(COUNT), 5))
    assert written(tmp_path / "out") == of_stock()
