"""Reads predictions of all ranks, in the order of the dataset."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from lightning_hpu_infer.writing import check_columns
from lightning_hpu_infer.writing.manifest import Manifest, all_manifests
from lightning_hpu_infer.writing.schemas import INDEX, LOADER, conformed, united
from lightning_hpu_infer.writing.storage import Storage, naming_unreadable, storage_at

_CACHED_BYTES = 256 << 20
"""Of row groups that later rows are in too."""
_AT_ONCE = 1 << 20
_BATCH_BYTES = 1 << 30
"""Of rows at a time. Arrow's strings and lists end at 2 GiB."""


def read_predictions(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """All predictions of a folder, in the order of the dataset: by dataloader, then by position.

    Tensors with the same shape for every sample are NumPy arrays by
    `table["prediction"].combine_chunks().to_numpy_ndarray()`.

    Args:
        path: A local folder or a URI, as the writer was given it.
        columns: Which columns; all by default.

    Returns:
        One row per sample that was written, whether the run is complete or not (`describe` tells).

    Raises:
        FileNotFoundError: If there are no predictions, or a file of theirs is lost.
        TypeError: If `columns` is a string.
        ValueError: If there is no such column, or files do not go together.
    """
    source = _Source(storage_at(path), columns)
    return pa.Table.from_batches(source.batches(1 << 16), source.schema)


def iter_predictions(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None, rows: int = 65_536
) -> Iterator[pa.RecordBatch]:
    """The predictions of a folder in the order of the dataset, some at a time.

    Memory: these rows, or fewer if they have more than 1 GiB; the row groups that they are in, some MiB each, of which
    up to 256 MiB are kept for later rows; and 16 bytes for each row of the folder. Files whose rows are in another
    order, such as those of `group_by_length`, are read repeatedly where a file's rows are spread over more of the
    dataset than this holds.

    Args:
        path: A local folder or a URI, as the writer was given it.
        columns: Which columns; all by default.
        rows: Rows at a time, at most: the last have less, and those with more than 1 GiB.

    Returns:
        Batches of the same schema, none of them empty.

    Raises:
        FileNotFoundError: If there are no predictions, or a file of theirs is lost.
        TypeError: If `columns` is a string.
        ValueError: If there is no such column, or files do not go together.
    """
    if rows < 1:
        raise ValueError(f"`rows` is {rows}. Pass at least 1.")
    return _Source(storage_at(path), columns).batches(rows)


def manifests_at(storage: Storage) -> list[Manifest]:
    """The manifests of a folder of predictions.

    Raises:
        FileNotFoundError: If there is none.
    """
    if manifests := all_manifests(storage):
        return manifests
    raise FileNotFoundError(f"{storage} holds no predictions: no folder 'rank-00000' with a manifest is in it.")


@dataclass(frozen=True)
class _RowGroup:
    file: str
    number: int
    rows: int


class _Source:
    """The row groups of a folder, and their rows in the order of the dataset."""

    def __init__(self, storage: Storage, columns: Sequence[str] | None) -> None:
        check_columns(columns)
        self._storage = storage
        manifests = manifests_at(storage)
        schema = united(manifest.schema for manifest in manifests) or pa.schema(
            [(INDEX, pa.int64()), (LOADER, pa.int32())]
        )
        names = schema.names if columns is None else list(columns)
        if lost := [name for name in names if name not in schema.names]:
            raise ValueError(f"{storage} has no column {lost[0]!r}. It has {', '.join(map(repr, schema.names))}.")
        self.schema = pa.schema([schema.field(name) for name in names])
        self._groups: list[_RowGroup] = []
        self._cache: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._files = [f"{manifest.folder}/{file.name}" for manifest in manifests for file in manifest.files]

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        """All rows in order, so many at a time."""
        order = self._order()
        ends = np.cumsum([group.rows for group in self._groups])
        last_use = np.zeros(len(ends), np.int64)
        for start in range(0, len(order), _AT_ONCE):
            places = order[start : start + _AT_ONCE]
            last_use[np.searchsorted(ends, places, side="right")] = np.arange(start, start + len(places))
        start, count = 0, rows
        while start < len(order):
            batch = self._gather(order[start : start + count], ends)
            if batch is None:
                count = min(count, len(order) - start) // 2
                continue
            start, count = start + batch.num_rows, min(rows, 2 * count)
            yield batch
            for number in [number for number in self._cache if last_use[number] < start]:
                del self._cache[number]

    def _order(self) -> NDArray[np.int64]:
        """Where the rows are that come first, second and so on, counted through all row groups."""
        keys = []
        for file in self._files:
            with self._open(file) as opened:
                for number in range(opened.metadata.num_row_groups):
                    found = opened.read_row_group(number, columns=[INDEX, LOADER])
                    self._groups.append(_RowGroup(file, number, found.num_rows))
                    keys.append((found[LOADER].to_numpy(), found[INDEX].to_numpy()))
        if not keys:
            return np.empty(0, np.int64)
        loaders, indices = (np.concatenate(part) for part in zip(*keys, strict=True))
        # By loader, then by index; equal ones in the order of ranks and files.
        return np.lexsort((indices, loaders)) if loaders.any() else np.argsort(indices, kind="stable")

    @contextmanager
    def _open(self, file: str) -> Iterator[parquet.ParquetFile]:
        try:
            source = self._storage.open(file)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self._storage}/{file} is listed and not there. To resume the run predicts its samples again."
            ) from error
        with source, naming_unreadable(f"{self._storage}/{file}"), parquet.ParquetFile(source) as opened:
            yield opened

    def _gather(self, places: NDArray[np.int64], ends: NDArray[np.int64]) -> pa.RecordBatch | None:
        """The rows at these places, in this order; None if they are several, and too large together.

        Each row group is looked at once.
        """
        groups = np.searchsorted(ends, places, side="right")
        by_group = np.argsort(groups, kind="stable")
        pieces: list[pa.RecordBatch] = []
        left = _BATCH_BYTES
        for number in np.unique(groups).tolist():
            inside = places[groups == number] - ends[number] + self._groups[number].rows
            first, last = int(inside[0]), int(inside[-1])
            group = self._read(number)
            if last - first + 1 == len(inside) and (np.diff(inside) == 1).all():
                pieces.append(group.slice(first, len(inside)))
            else:
                pieces.append(group.take(pa.array(inside)))
            left -= pieces[-1].nbytes
            if left < 0 and len(places) > 1:
                return None
        (batch,) = pa.Table.from_batches(pieces).combine_chunks().to_batches()
        if (np.diff(by_group) == 1).all():
            return batch
        return batch.take(pa.array(np.argsort(by_group)))

    def _read(self, number: int) -> pa.RecordBatch:
        if number not in self._cache:
            group = self._groups[number]
            with self._open(group.file) as opened:
                table = opened.read_row_group(group.number, columns=self.schema.names).combine_chunks()
            there = set(table.column_names)
            arrays = [table[name].chunk(0) if name in there else pa.nulls(group.rows) for name in self.schema.names]
            self._cache[number] = conformed(arrays, self.schema)
        self._cache.move_to_end(number)
        while len(self._cache) > 1 and sum(batch.nbytes for batch in self._cache.values()) > _CACHED_BYTES:
            self._cache.popitem(last=False)
        return self._cache[number]
