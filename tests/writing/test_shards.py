"""Files are committed by rows, by time and at the end, and what is committed stays."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from lightning_hpu_infer.writing import shards as module
from lightning_hpu_infer.writing import storage
from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.manifest import MANIFEST, Manifest, all_manifests
from lightning_hpu_infer.writing.shards import Shards
from lightning_hpu_infer.writing.storage import LocalStorage
from tests.writing.runs import batches_of, in_files, names, opened, predictions, write_batches


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(rank=0, world=1, fingerprint={})


def test_a_file_is_committed_at_so_many_rows(tmp_path: Path, manifest: Manifest) -> None:
    shards = Shards(LocalStorage(tmp_path), manifest, rows_per_file=10)
    write_batches(shards, Columns(), batches_of(range(20)))
    # On the boundaries of batches of 4.
    assert names(tmp_path) == [
        "rank-00000/.part-00001.parquet.tmp",
        "rank-00000/_manifest.json",
        "rank-00000/part-00000.parquet",
    ]
    assert in_files(tmp_path) == list(range(12))
    shards.close(complete=True)
    (stored,) = all_manifests(LocalStorage(tmp_path))
    assert [(file.rows, file.indices) for file in stored.files] == [(12, {0: [[0, 12, 1]]}), (8, {0: [[12, 20, 1]]})]
    assert stored.complete
    assert stored.schema is not None
    assert stored.schema.field("vector").type == pa.fixed_shape_tensor(pa.int64(), (2,))
    for file in stored.files:
        data = (tmp_path / "rank-00000" / file.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)


def test_a_file_is_committed_after_so_many_seconds(tmp_path: Path, manifest: Manifest) -> None:
    now = 0.0
    shards = Shards(LocalStorage(tmp_path), manifest, seconds_per_file=60, clock=lambda: now)
    columns = Columns()
    committed = []
    for start in range(0, 40, 4):
        write_batches(shards, columns, [range(start, start + 4)])
        committed.append(shards.manifest.rows)
        now += 25
    assert committed == [0, 0, 0, 16, 16, 16, 16, 32, 32, 32]
    shards.abort()
    assert in_files(tmp_path) == list(range(32))
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_memory_is_bounded_by_row_groups(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes 1 KiB beside its values, here 824 bytes of them."""
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 2 * 1024 + 1000)
    shards = Shards(LocalStorage(tmp_path), manifest)
    columns = Columns()
    for _ in range(6):
        shards.write(columns.batch(torch.zeros(2, 100), 2, [0, 1], 0))
    shards.close(complete=True)
    metadata = parquet.ParquetFile(tmp_path / "rank-00000" / "part-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 4, 4]


def test_a_type_that_appears_later_begins_a_file(tmp_path: Path, manifest: Manifest) -> None:
    shards = Shards(LocalStorage(tmp_path), manifest)
    columns = Columns()
    for values in ([None, None], ["a", None]):
        shards.write(columns.batch({"x": values}, 2, [0, 1], 0))
    shards.close(complete=True)
    types = [parquet.read_schema(file).field("x").type for file in sorted(tmp_path.rglob("*.parquet"))]
    assert types == [pa.null(), pa.string()]
    assert shards.manifest.schema is not None
    assert shards.manifest.schema.field("x").type == pa.string()


def test_samples_that_are_no_few_ranges_are_read_from_the_file(tmp_path: Path, manifest: Manifest) -> None:
    squares = [i * i for i in range(200)]
    shards = Shards(LocalStorage(tmp_path), manifest)
    write_batches(shards, Columns(), batches_of(squares))
    write_batches(shards, Columns(), batches_of(squares[:8]), dataloader_idx=1)
    shards.close(complete=True)
    assert shards.manifest.files[0].indices is None
    done = opened(tmp_path, fingerprint={}).done
    assert {loader: indices.tolist() for loader, indices in done.items()} == {0: squares, 1: squares[:8]}


def test_nothing_is_written_where_nothing_was_predicted(tmp_path: Path, manifest: Manifest) -> None:
    shards = Shards(LocalStorage(tmp_path), manifest, rows_per_file=1)
    shards.write(Columns().batch(torch.zeros(2), 2, [0, 1], 0).slice(0, 0))
    shards.close(complete=True)
    assert names(tmp_path) == ["rank-00000/_manifest.json"]


class FullDisk:
    """A file on a disk that has room for so many bytes more, and for half a write."""

    def __init__(self, file: Any, disk: dict[str, int]) -> None:
        self._file, self._disk = file, disk

    def write(self, data: memoryview) -> int:
        if not self._disk["room"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(len(data), self._disk["room"])
        self._disk["room"] -= taken
        return int(self._file.write(data[:taken]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 1, 700, 2000, 3000, 4000, 5000, 6000, 7000, 8000])
def test_a_full_disk_leaves_what_was_committed(
    tmp_path: Path, manifest: Manifest, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = {"room": 10**9}
    monkeypatch.setattr(
        storage,
        "open",
        lambda *args, **options: FullDisk(open(*args, **options), disk),  # noqa: SIM115
        raising=False,
    )
    shards = Shards(LocalStorage(tmp_path), manifest, rows_per_file=8)
    columns = Columns()
    write_batches(shards, columns, batches_of(range(16)))
    disk["room"] = room
    place = rf"{tmp_path}/rank-00000/(part-\d+.parquet|{MANIFEST})"
    with pytest.raises(OSError, match=f"No space left on device: '{place}'"):
        write_batches(shards, columns, batches_of(range(16, 400)))
    listed = sum(file.rows for file in all_manifests(LocalStorage(tmp_path))[0].files)
    assert listed >= 16
    assert in_files(tmp_path)[:listed] == list(range(listed))
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    disk["room"] = 10**9
    left = opened(tmp_path, fingerprint={}).done[0].tolist()
    assert left == in_files(tmp_path) == list(range(listed))


def test_what_fails_at_the_last_commit_is_named(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards(LocalStorage(tmp_path), manifest)
    write_batches(shards, Columns(), batches_of(range(8)))

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/rank-00000/part-00000.parquet'"):
        shards.close(complete=True)


def test_predictions_are_as_they_were(tmp_path: Path, manifest: Manifest) -> None:
    shards = Shards(LocalStorage(tmp_path), manifest)
    write_batches(shards, Columns(), batches_of(range(8)))
    shards.close(complete=True)
    table = parquet.read_table(tmp_path / "rank-00000" / "part-00000.parquet")
    expected = predictions(range(8))
    assert table["text"].to_pylist() == expected["text"]
    assert table["vector"].type == pa.list_(pa.int64(), 2)
    assert table["vector"].to_pylist() == expected["vector"].tolist()
