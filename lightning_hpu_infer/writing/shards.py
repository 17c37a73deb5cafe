"""A rank's files: rows are appended, and what is committed stays."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from lightning_hpu_infer.writing.manifest import MANIFEST, File, Manifest, Stretch
from lightning_hpu_infer.writing.ranges import Ranges, ranges_of
from lightning_hpu_infer.writing.schemas import INDEX, LOADER, as_stored, stored
from lightning_hpu_infer.writing.storage import Sink, Storage

_log = logging.getLogger(__name__)

ROW_GROUP_BYTES = 8 << 20
_MOST_BYTES = 1 << 30
"""Of a row group, unless it is one batch: Arrow's strings and lists end at 2 GiB."""
_BATCH_BYTES = 1024
"""What a batch takes in memory beside its values, so that very many small ones are bounded too."""


class Shards:
    """Writes batches to Parquet files, one after the other. All calls come from one thread at a time.

    A file is committed, which means complete under its name and listed in the manifest, when it has `rows_per_file`
    rows or `seconds_per_file` have passed since its first batch; between batches only. What is not committed is lost
    with the process. After an error no more can be written; what was committed stays.

    Args:
        storage: Where.
        manifest: The rank's, which lists the files of earlier runs. It is changed and stored at each commit.
        rows_per_file: Rows after which a file is committed.
        seconds_per_file: Seconds after which it is, at the next batch.
        compression: A codec of Parquet: "zstd", "snappy", "gzip", "lz4", "none" ...
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        *,
        rows_per_file: int = 1_000_000,
        seconds_per_file: float = 60.0,
        compression: str = "zstd",
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._storage = storage
        self.manifest = manifest
        self._rows_per_file = rows_per_file
        self._seconds_per_file = seconds_per_file
        self._compression = compression
        self._clock = clock
        self._next = 1 + max((_number(name) for name in storage.names(manifest.folder)), default=-1)
        self._file: _Growing | None = None
        self._ended = False

    def write(self, batch: pa.RecordBatch, stretch: Stretch | None = None) -> None:
        """Append a batch, and commit the file if it is time to. One without rows changes nothing.

        Args:
            batch: Its rows.
            stretch: Where they are in the stream, if its samples have no indices.

        Raises:
            OSError: If the disk is full, for one. What was committed stays; nothing more is written.
        """
        assert not self._ended, "written to after its end"
        if not batch.num_rows:
            return
        try:
            if self._file is not None and self._file.schema != batch.schema:
                self._commit()
            if self._file is None:
                name = f"part-{self._next:05d}.parquet"
                self._next += 1
                sink = self._storage.create(f"{self.manifest.folder}/{name}")
                self._file = _Growing(name, sink, batch.schema, self._compression, self._clock())
            self._file.append(batch, stretch)
            if self._file.rows >= self._rows_per_file or self._clock() - self._file.began >= self._seconds_per_file:
                self._commit()
        except BaseException:
            self.abort()
            raise

    def commit(self) -> None:
        """Close the current file, if any, and list it.

        Raises:
            OSError: If it cannot be written.
        """
        assert not self._ended, "committed after its end"
        try:
            self._commit()
        except BaseException:
            self.abort()
            raise

    def close(self, *, complete: bool) -> None:
        """Commit, and end.

        Args:
            complete: Whether the run has come to its end, so that the rank has written all that it had to.

        Raises:
            OSError: If it cannot be written.
        """
        if self._ended:
            return
        self.commit()
        if complete:
            self._list(complete=True)
        self._ended = True

    def abort(self) -> None:
        """End without what was not committed. Nothing is raised."""
        self._ended = True
        file, self._file = self._file, None
        if file is not None:
            # The next run removes what this one cannot.
            with suppress(Exception):
                file.discard()

    def _commit(self) -> None:
        file = self._file
        if file is not None:
            written = file.publish()
            self._file = None
            self._list(files=[*self.manifest.files, written], schema=file.schema, complete=False)

    def _list(self, **changes: Any) -> None:
        """Change the manifest on the disk, and only then in memory."""
        manifest = replace(self.manifest, **changes)
        manifest.store(self._storage)
        self.manifest = manifest


class _Growing:
    """The file that is being written."""

    def __init__(self, name: str, sink: Sink, schema: pa.Schema, compression: str, began: float) -> None:
        self.name = name
        self.schema = schema
        self.began = began
        self.rows = 0
        self._sink = sink
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0
        self._indices: dict[int, list[NDArray[np.int64]]] = {}
        self._streams: dict[int, list[Stretch]] = {}
        try:
            # Dictionaries of numbers cost time and rarely save room.
            texts = [f.name for f in schema if pa.types.is_string(f.type) or f.name == LOADER]
            self._stored = pa.schema([(f.name, stored(f.type)) for f in schema])
            self._writer = parquet.ParquetWriter(sink, self._stored, compression=compression, use_dictionary=texts)
        except BaseException:
            with suppress(Exception):
                sink.discard()
            raise

    def append(self, batch: pa.RecordBatch, stretch: Stretch | None) -> None:
        """Add a batch; a row group is written whenever some MiB have come together."""
        self.rows += batch.num_rows
        loader = batch.column(LOADER)[0].as_py()
        self._indices.setdefault(loader, []).append(batch.column(INDEX).to_numpy().copy())
        if stretch is not None:
            self._note(stretch, self._streams.setdefault(loader, []))
        if self._pending_bytes + batch.nbytes > _MOST_BYTES:
            self._flush()
        self._pending.append(
            pa.RecordBatch.from_arrays([as_stored(each) for each in batch.columns], schema=self._stored)
        )
        self._pending_bytes += batch.nbytes + _BATCH_BYTES
        if self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def publish(self) -> File:
        """Write what is pending and the end of the file, and give it its name."""
        self._flush()
        self._writer.close()
        size, sha256 = self._sink.size, self._sink.sha256
        self._sink.publish()
        return File(
            name=self.name, rows=self.rows, bytes=size, sha256=sha256, indices=self._ranges(), streams=self._streams
        )

    def discard(self) -> None:
        """Remove it."""
        try:
            self._sink.discard()
        finally:
            self._writer.close()  # It writes the end of the file, into nothing.

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending, self._stored)
            self._pending, self._pending_bytes = [], 0
            self._writer.write_table(table, row_group_size=table.num_rows)

    @staticmethod
    def _note(stretch: Stretch, before: list[Stretch]) -> None:
        first, stop, batches = stretch
        if before and before[-1][1] == first:
            before[-1][1:] = stop, batches
        else:
            before.append([first, stop, batches])

    def _ranges(self) -> dict[int, Ranges] | None:
        found: dict[int, Ranges] = {}
        for loader, parts in self._indices.items():
            ranges = ranges_of(np.concatenate(parts))
            if ranges is None:
                return None
            found[loader] = ranges
        return found


def _number(name: str) -> int:
    """The number in the name of a file, temporary or not; -1 if it is no file of ours."""
    stem = name.removeprefix(".").partition(".")[0].removeprefix("part-")
    return int(stem) if stem.isdecimal() else -1


def is_ours(name: str) -> bool:
    """Whether a file in a rank's folder is one that a run writes: Parquet, manifest, or temporary."""
    return _number(name) >= 0 or name in (MANIFEST, f".{MANIFEST}.tmp")
