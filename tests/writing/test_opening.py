"""A folder is opened by whom it belongs to: what is there is kept, checked, cleaned up, or refused."""

import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.lock import Lock
from lightning_hpu_infer.writing.manifest import MANIFEST, all_manifests
from lightning_hpu_infer.writing.opening import Opened, open_path
from lightning_hpu_infer.writing.storage import LocalStorage
from tests.writing.runs import batches_of, in_files, names, opened, run, write_batches


def done(path: Path, **options: Any) -> dict[int, list[int]]:
    each = opened(path, **options)
    each.release()
    return {loader: indices.tolist() for loader, indices in each.done.items()}


def test_a_run_goes_on_where_another_stopped(tmp_path: Path) -> None:
    run(tmp_path, range(10), complete=False)
    assert done(tmp_path) == {0: list(range(10))}
    run(tmp_path, range(20))
    assert in_files(tmp_path) == list(range(20))
    assert [manifest.complete for manifest in all_manifests(LocalStorage(tmp_path))] == [True]


def test_what_is_done_has_its_type_and_multiplicity(tmp_path: Path) -> None:
    run(tmp_path, [3, 3, 1])
    each = opened(tmp_path)
    each.release()
    assert each.done[0].dtype == np.int64
    assert each.done[0].tolist() == [1, 3, 3]
    assert each.schema is not None
    assert each.schema.names == ["index", "dataloader_idx", "value", "vector", "text"]


def test_ranks_know_of_each_other_and_their_number_may_change(tmp_path: Path) -> None:
    for rank in range(3):
        run(tmp_path, range(rank, 12, 3), rank, 3)
    assert done(tmp_path, rank=1, world=2) == {0: list(range(12))}
    run(tmp_path, range(20), 0, 1)
    assert in_files(tmp_path) == list(range(20))


@pytest.mark.parametrize(
    ("earlier", "later", "words"),
    [
        ({"seed": 1}, {"seed": 2}, "seed was 1 and is 2"),
        ({"seed": 1}, {}, "seed was 1 and is nothing"),
        ({}, {"seed": None}, "seed was nothing and is null"),
        ({"files": ["a" * 100]}, {"files": ["b" * 100]}, r'files was \["aaaa.*\.\.\.a+"\] and is \["bbbb'),
    ],
)
def test_predictions_of_another_run_are_refused(
    tmp_path: Path, earlier: dict[str, Any], later: dict[str, Any], words: str
) -> None:
    run(tmp_path, range(4), fingerprint=earlier)
    with pytest.raises(ValueError, match=f"(?s){words}.*overwrite=True.*another path"):
        opened(tmp_path, fingerprint=later)
    assert in_files(tmp_path) == list(range(4))
    run(tmp_path, range(6), fingerprint=later, overwrite=True)
    assert in_files(tmp_path) == list(range(6))
    assert all_manifests(LocalStorage(tmp_path))[0].fingerprint == later


def test_values_are_compared_as_json_has_them(tmp_path: Path) -> None:
    run(tmp_path, range(4), fingerprint={"lengths": (1, 2), "by": {1: 2}})
    opened(tmp_path, fingerprint={"lengths": [1, 2], "by": {"1": 2}}).release()


def test_a_run_that_wrote_nothing_binds_nobody(tmp_path: Path) -> None:
    run(tmp_path, [], fingerprint={"seed": 1}, complete=False)
    run(tmp_path, range(4), fingerprint={"seed": 2}, resume=False)


def test_without_resume_predictions_are_refused(tmp_path: Path) -> None:
    run(tmp_path, range(4), resume=False)
    with pytest.raises(FileExistsError, match=r"(?s)predictions of 4 samples.*resume=True.*overwrite=True"):
        opened(tmp_path, resume=False)
    run(tmp_path, range(2), resume=False, overwrite=True)
    assert in_files(tmp_path) == [0, 1]


def test_other_peoples_files_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match=r"other files \(thesis.txt\)"):
            opened(tmp_path, **options)
    assert names(tmp_path) == ["thesis.txt"]
    assert not (tmp_path / ".locks").exists()


def test_overwriting_leaves_what_is_not_ours(tmp_path: Path) -> None:
    run(tmp_path, range(4))
    run(tmp_path, range(4), 1, 2)
    others = ["notes.txt", "rank-00000/notes.txt", "rank-00002/thesis.txt", "rank-x/a.parquet"]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    opened(tmp_path, overwrite=True).release()
    assert names(tmp_path) == sorted([*others, f"rank-00000/{MANIFEST}"])
    assert not (tmp_path / "rank-00001").exists()


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    run(tmp_path, range(8))
    run(tmp_path, range(8, 16), 1, 2)
    for folder in ("rank-00000", "rank-00001"):
        (tmp_path / folder / ".part-00007.parquet.tmp").write_bytes(b"half")
        (tmp_path / folder / "part-00006.parquet").write_bytes(b"whole, but it was not listed")
    (tmp_path / "rank-00002").mkdir()
    assert done(tmp_path) == {0: list(range(16))}
    assert in_files(tmp_path) == list(range(16))
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert not (tmp_path / "rank-00002").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_files_that_are_lost_or_cut_are_predicted_again(tmp_path: Path, rank: int) -> None:
    run(tmp_path, range(8))
    run(tmp_path, range(8, 32), 1, 2)
    folder = tmp_path / f"rank-{rank:05d}"
    lost = folder / "part-00000.parquet"
    if rank:
        lost.unlink()
        cut = folder / "part-00001.parquet"
        cut.write_bytes(cut.read_bytes()[:-1])
    else:
        lost.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"part-0000\d.parquet (has \d+ bytes, not \d+|is missing).* predicted again"):
        left = done(tmp_path)[0]
    assert left == (list(range(8, 32)) if rank == 0 else [*range(8), *range(24, 32)])
    assert in_files(tmp_path) == left
    run(tmp_path, range(32))
    assert in_files(tmp_path) == list(range(32))


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(RuntimeError, match=r"Another run writes predictions of rank 0.*another path"):
        opened(tmp_path)
    opened(tmp_path, 1, 2).release()
    first.release()
    opened(tmp_path).release()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_that_is_left_of_a_killed_run_keeps_its_files(tmp_path: Path, world: int, overwrite: bool) -> None:
    """The others were killed, or have come to their end before it."""
    run(tmp_path, range(0, 16, 2), 0, 3, complete=False)
    left = opened(tmp_path, 2, 3)
    shards = left.shards(rows_per_file=4)
    write_batches(shards, Columns(), [[1, 3, 5, 7], [9, 11]])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"Another run writes predictions of rank 2.*another path"):
            opened(tmp_path, 0, world, overwrite=overwrite)
    shards.close(complete=True)
    left.release()
    assert in_files(tmp_path) == sorted([*range(0, 16, 2), *range(1, 13, 2)])
    run(tmp_path, range(16), 0, world, overwrite=overwrite)
    assert in_files(tmp_path) == list(range(16))
    opened(tmp_path, 2, 3).release()  # nobody is left in it


def test_what_is_no_lock_of_a_rank_is_passed_over(tmp_path: Path) -> None:
    run(tmp_path, range(4))
    for name in ("rank-x.lock", "rank-.lock", "notes.txt"):
        (tmp_path / ".locks" / name).touch()
    opened(tmp_path).release()


def test_an_error_while_opening_lets_others_in(tmp_path: Path) -> None:
    run(tmp_path, range(4), fingerprint={"seed": 1})
    for _ in range(2):
        with pytest.raises(ValueError, match="seed"):
            opened(tmp_path, fingerprint={"seed": 2})


def hold(path: Path, ready: Any, worker: Any) -> None:
    each = opened(path)
    shards = each.shards(rows_per_file=4)
    write_batches(shards, Columns(), [*batches_of(range(8)), [8]])
    if forked := os.fork():
        worker.value = forked
        ready.set()
    signal.pause()


@pytest.mark.usefixtures("path_without_vision")
def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    """Its workers, which a DataLoader forks, live on for seconds."""
    context = multiprocessing.get_context("spawn")
    ready, worker = context.Event(), context.Value("i")
    process = context.Process(target=hold, args=(tmp_path, ready, worker))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match="Another run"):
        opened(tmp_path)
    assert process.pid is not None
    assert worker.value > 0
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    try:
        assert done(tmp_path) == {0: list(range(8))}
        assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    finally:
        os.kill(worker.value, signal.SIGKILL)


@pytest.mark.parametrize("overwrite", [False, True])
def test_ranks_that_open_at_once_agree(tmp_path: Path, overwrite: bool) -> None:
    for rank in range(4):
        run(tmp_path, range(rank, 40, 4), rank, 4)
    agree = Agreement(3)
    found: dict[int, Opened] = {}

    def open_as(rank: int) -> None:
        found[rank] = open_path(tmp_path, rank, 3, fingerprint={"model": "a"}, overwrite=overwrite, agree=agree)
        # Who is through first begins to write at once.
        shards = found[rank].shards(rows_per_file=4)
        write_batches(shards, Columns(), batches_of(range(100 + rank, 112 + rank)))
        shards.close(complete=True)
        found[rank].release()

    threads = [threading.Thread(target=open_as, args=(rank,), name=f"rank {rank}") for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {} if overwrite else {0: list(range(40))}
    for rank in range(3):
        assert {loader: indices.tolist() for loader, indices in found[rank].done.items()} == expected


@pytest.mark.parametrize(("reason", "overwrite"), [("lock", False), ("lock", True), ("fingerprint", False)])
def test_if_one_rank_cannot_open_none_does(tmp_path: Path, reason: str, overwrite: bool) -> None:
    for rank in range(2):
        run(tmp_path, range(rank, 8, 2), rank, 2)
    agree, errors = Agreement(2), dict[int, str]()

    def open_as(rank: int) -> None:
        fingerprint = {"model": "b" if rank == 1 and reason == "fingerprint" else "a"}
        try:
            open_path(tmp_path, rank, 2, fingerprint=fingerprint, overwrite=overwrite, agree=agree)
        except Exception as error:
            errors[rank] = str(error)

    other = Lock(tmp_path, 1) if reason == "lock" else None
    threads = [threading.Thread(target=open_as, args=(rank,), name=f"rank {rank}") for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if other is not None:
        other.release()
    assert set(errors) == {0, 1}
    assert errors[0].startswith(f"Another rank could not open {tmp_path}")
    assert not errors[1].startswith("Another rank")
    assert done(tmp_path, world=2) == {0: list(range(8))}  # nobody is left in it


class Agreement:
    """What ranks agree on, here threads."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks)
        self._given: list[bool] = []

    def __call__(self, given: bool) -> bool:
        self._given.append(given)
        self._barrier.wait(30)
        agreed = all(self._given)
        if self._barrier.wait(30) == 0:
            self._given.clear()
        self._barrier.wait(30)
        return agreed


DAMAGED = {
    "of version 2.*Update": ('"version": 1', '"version": 2'),
    "no manifest of predictions: KeyError": ("lightning_hpu_infer predictions", "shopping list"),
    "no manifest of predictions: JSONDecodeError": ("{", ""),
    "no manifest of predictions: TypeError": ('"version": 1', '"version": "1"'),
    "no manifest of predictions: Unicode": ("lightning", "\udcff"),
    "no manifest of predictions: .*lines": ('"rows": 4', '"lines": 4'),
    "no manifest of predictions: .*base64|padding": ('"schema": "', '"schema": "x'),
}


@pytest.mark.parametrize("words", DAMAGED)
def test_manifests_that_cannot_be_read(tmp_path: Path, words: str) -> None:
    run(tmp_path, range(0, 8, 2), 0, 2)
    run(tmp_path, range(1, 8, 2), 1, 2)
    path = tmp_path / "rank-00001" / MANIFEST
    text = path.read_text()
    changed = text.replace(*DAMAGED[words], 1)
    assert changed != text
    path.write_bytes(changed.encode(errors="surrogateescape"))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=f"rank-00001/{MANIFEST} is {words}.*Remove .*rank-00001 to .*overwrite=True"
        ):
            opened(tmp_path)
    if words.startswith("of"):
        shutil.rmtree(tmp_path / "rank-00001")
        assert done(tmp_path) == {0: list(range(0, 8, 2))}
    else:
        run(tmp_path, range(8), overwrite=True)
        assert in_files(tmp_path) == list(range(8))
        assert names(tmp_path) == [f"rank-00000/{MANIFEST}", "rank-00000/part-00000.parquet"]
