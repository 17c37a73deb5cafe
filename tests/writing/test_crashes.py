"""A run is killed at each operation on the file system: what was committed is there once, and nothing is half."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from lightning_hpu_infer.writing import storage
from lightning_hpu_infer.writing.manifest import all_manifests
from lightning_hpu_infer.writing.storage import LocalStorage
from tests.writing.runs import in_files, names, run, value_of

OPERATIONS = ("open", "fsync", "replace", "unlink", "mkdir", "rmdir", "close", "write")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of operations is what is tested, not the disk, which takes milliseconds for each flush."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class KilledError(BaseException):
    """The process is gone: nobody catches this, and whatever is tried after it does nothing."""


class Disk:
    """Stands for `os` and `open`, until the process is killed before its n-th operation."""

    def __init__(self, operations: int) -> None:
        self.left = operations
        self.files: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        return self.counted(function) if name in OPERATIONS else function

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.left <= 0:
                raise KilledError
            self.left -= 1
            return function(*args, **options)

        return call

    def open_file(self, *args: Any, **options: Any) -> Any:
        self.files.append(self.counted(open)(*args, **options))
        return File(self, self.files[-1])


class File:
    """A file of such a disk. A killed process's files are closed by the system."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self._disk, self._file = disk, file
        self.write = disk.counted(file.write)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def killed_after(operations: int, path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run until killed; whether it was."""
    disk = Disk(operations)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "os", disk)
        patched.setattr(storage, "open", disk.open_file, raising=False)
        try:
            run(path, range(24), overwrite=overwrite)
        except KilledError:
            return True
        finally:
            for file in disk.files:
                file.close()
    return False


def check(path: Path, before: int) -> None:
    """All listed files are whole, and no row that was committed is lost."""
    listed = [
        path / manifest.folder / file.name for manifest in all_manifests(LocalStorage(path)) for file in manifest.files
    ]
    rows = [row for file in listed for row in parquet.read_table(file).to_pylist()]
    assert len(rows) >= before
    assert [row["value"] for row in rows] == [value_of(row["index"]) for row in rows]
    assert len({row["index"] for row in rows}) == len(rows)
    found = in_files(path)  # Any file of this name can be read.
    assert set(found) >= {row["index"] for row in rows}


@pytest.mark.parametrize("overwrite", [False, True], ids=["resume", "overwrite"])
def test_killed_at_every_operation(tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    operations, killed = 0, True
    while killed:
        path = tmp_path / str(operations)
        run(path, range(8), complete=False)
        (path / "rank-00000" / ".part-00009.parquet.tmp").write_bytes(b"of a run before")
        killed = killed_after(operations, path, overwrite, monkeypatch)
        check(path, 0 if overwrite else 8)
        run(path, range(32))
        assert in_files(path) == list(range(32))
        check(path, 32)
        assert not [name for name in names(path) if name.endswith(".tmp")]
        operations += 1
    assert operations > 40


def test_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed, operations = 0, 1
    while killed_after(operations, tmp_path, False, monkeypatch):
        check(tmp_path, committed)
        manifests = all_manifests(LocalStorage(tmp_path))
        committed = sum(manifest.rows for manifest in manifests)
        operations += 3
    check(tmp_path, 24)
    assert in_files(tmp_path) == list(range(24))
