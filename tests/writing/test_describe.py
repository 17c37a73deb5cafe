"""What is in a folder, what is missing, and what is broken; on the command line too."""

import json
import random
import sys
from pathlib import Path

import pytest

from lightning_hpu_infer import cli
from lightning_hpu_infer.writing.describe import describe
from tests.writing.runs import names, run

LENGTHS = {"dataset lengths": [40]}


def test_a_complete_run(tmp_path: Path) -> None:
    for rank in range(2):
        run(tmp_path, range(rank, 40, 2), rank, 2, fingerprint=LENGTHS)
    found = describe(tmp_path, verify=True)
    assert found.sound
    assert (found.rows, found.missing, found.problems) == (40, {0: []}, [])
    assert [(rank.rank, rank.rows, rank.files) for rank in found.ranks] == [(0, 20, 3), (1, 20, 3)]
    assert list(found.columns) == ["index", "dataloader_idx", "value", "vector", "text"]


def test_what_is_missing(tmp_path: Path) -> None:
    run(tmp_path, [*range(3, 10), 20, *range(22, 39)], complete=False, fingerprint=LENGTHS)
    found = describe(tmp_path)
    assert not found.complete
    assert found.missing == {0: [(0, 3), (10, 20), (21, 22), (39, 40)]}
    assert "missing of dataloader 0: 0-2, 10-19, 21, 39 (15 samples)" in str(found)


def test_what_is_missing_beside_a_stream(tmp_path: Path) -> None:
    run(tmp_path, range(3, 10), fingerprint={"dataset lengths": [12, None, 2]})
    assert describe(tmp_path).missing == {0: [(0, 3), (10, 12)], 2: [(0, 2)]}


def test_samples_that_are_there_several_times(tmp_path: Path) -> None:
    """As with replacement, or where two runs wrote at once to a store without locks."""
    run(tmp_path, [*range(10), 3, 3, 5], fingerprint=LENGTHS)
    found = describe(tmp_path)
    assert found.repeated == {0: 2}
    assert "several times of dataloader 0: 2 samples" in str(found)
    assert (found.rows, found.missing, found.problems) == (13, {0: [(10, 40)]}, [])


def test_a_file_that_cannot_be_read_is_broken(tmp_path: Path) -> None:
    """Its size is right, and where its samples are is in its columns alone."""
    shuffled = random.Random(0).sample(range(4000), 2000)
    run(tmp_path, shuffled, rows_per_file=2000, fingerprint={"dataset lengths": [4000]})
    file = tmp_path / "rank-00000" / "part-00000.parquet"
    file.write_bytes(bytes(file.stat().st_size))
    found = describe(tmp_path)
    assert not found.sound
    assert found.missing == {0: [(0, 4000)]}
    assert "part-00000.parquet cannot be read" in found.problems[0]


def test_a_rank_that_never_came(tmp_path: Path) -> None:
    run(tmp_path, range(0, 40, 2), 0, 2, fingerprint=LENGTHS)
    found = describe(tmp_path)
    assert not found.complete
    assert found.missing is not None
    assert len(found.missing[0]) == 20
    assert "and 12 more (20 samples)" in str(found)


def test_ranks_of_an_earlier_run_need_not_come_to_their_end(tmp_path: Path) -> None:
    for rank in range(3):
        run(tmp_path, range(rank, 20, 3), rank, 3, complete=False)
    assert not describe(tmp_path).complete
    run(tmp_path, range(40))
    found = describe(tmp_path)
    assert found.complete
    assert (found.rows, found.missing) == (40, None)


def test_files_that_are_broken_are_named(tmp_path: Path) -> None:
    run(tmp_path, range(40), fingerprint=LENGTHS)
    files = [tmp_path / name for name in names(tmp_path) if name.endswith(".parquet")]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    data = bytearray(files[2].read_bytes())
    data[len(data) // 2] ^= 1
    files[2].write_bytes(data)
    quick = describe(tmp_path)
    assert [text.split(" ")[0] for text in quick.problems] == [
        f"rank-00000/part-0000{number}.parquet" for number in (0, 1)
    ]
    assert quick.missing == {0: [(0, 16)]}
    found = describe(tmp_path, verify=True)
    assert found.complete
    assert not found.sound
    assert found.problems[2] == "rank-00000/part-00002.parquet has other contents than were written"
    assert found.missing == {0: [(0, 24)]}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predictions"
    assert cli.main(["predictions", str(path)]) == 2
    assert "holds no predictions" in capsys.readouterr().err
    run(path, range(10), complete=False, fingerprint=LENGTHS)
    assert cli.main(["predictions", str(path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: incomplete, 10 rows",
        f"rank 0: incomplete, 10 rows in 2 files, {sum(f.stat().st_size for f in path.rglob('*.parquet'))} bytes",
        "missing of dataloader 0: 10-39 (30 samples)",
    ]
    run(path, range(40), fingerprint=LENGTHS)
    assert cli.main(["predictions", str(path), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["complete"], found["verified"], found["missing"]) == (40, True, True, {"0": []})
    next(path.rglob("*.parquet")).write_bytes(b"")
    assert cli.main(["predictions", str(path)]) == 1
    assert "broken: rank-00000/part-0000" in capsys.readouterr().out


def test_without_pyarrow(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("lightning_hpu_infer.writing"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert cli.main(["predictions", str(tmp_path)]) == 2
    assert "pip install 'lightning-hpu-infer[write]'" in capsys.readouterr().err
