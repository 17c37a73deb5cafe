"""Outputs of batches that ran in any order, back in the batches of stock Lightning."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hpu_infer.nested import parts_of, with_parts

OFF = "or pass `group_by_length=None`, and no `lengths`"
"""The way out that messages name."""


class _Tensors(NamedTuple):
    """A leaf whose rows are samples, and what all of its rows have in common."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"a tensor with rows of shape {self.shape}, {self.dtype} on {self.device}"


class _PerSample(NamedTuple):
    """A list with one element per sample."""

    type: type

    def __str__(self) -> str:
        return "a list with one element per sample"


class _Nothing(NamedTuple):
    """None, in every batch."""

    def __str__(self) -> str:
        return "None"


class _Collection(NamedTuple):
    """What has parts."""

    type: type
    names: tuple[Any, ...]

    def __str__(self) -> str:
        return f"a {self.type.__name__} of {', '.join(map(repr, self.names)) or 'nothing'}"


_Kind = _Tensors | _PerSample | _Nothing | _Collection
_Path = tuple[Any, ...]


class Restorer:
    """Takes the outputs of batches that ran in any order and gives them back as stock Lightning's batches.

    An output is split into its samples' rows: tensors along dimension 0, and lists as long as the batch by element.
    Mappings, tuples, dataclasses and other lists are looked into. How to read an output is decided at the first batch,
    and every later one has to be alike. Nothing is copied before `batches`.

    Args:
        order: The samples in stock order, batch after batch, without those that stock Lightning drops. An index may be
            there several times: its first output then goes to its first position, and so on.
        batch_size: Samples in each of stock Lightning's batches but the last.

    Raises:
        ValueError: If `batch_size` is not positive.
    """

    def __init__(self, order: Sequence[int], batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, got {batch_size}.")
        self._order = [index(i) for i in order]
        self._batch_size = batch_size
        self._rows: list[tuple[Any, ...] | None] = [None] * len(self._order)
        self._slots: dict[int, deque[int]] = defaultdict(deque)
        for slot, i in enumerate(self._order):
            self._slots[i].append(slot)
        self._kinds: dict[_Path, _Kind] = {}
        self._first: Any = None
        # Batches of one sample are not split, whatever they are.
        self._whole = min(batch_size, len(self._order)) == 1

    def add(self, indices: Sequence[int], output: Any) -> None:
        """Take the output of the next batch.

        Args:
            indices: The samples of the batch, row by row.
            output: What came of it. Its tensors are kept, not copied.

        Raises:
            ValueError: If the output cannot be split into samples, if it is not like that of the first batch, or if a
                sample has had its turn already.
        """
        count = len(indices)
        if not 0 < count <= self._batch_size:
            raise ValueError(f"A batch of {count} samples cannot be one of at most {self._batch_size}.")
        if self._whole:
            rows: list[tuple[Any, ...]] = [(output,)]
        else:
            if not self._kinds:
                self._kinds = dict(_kinds(output, count, ()))
                self._first = output
            columns = list(self._columns(output, count, ()))
            rows = list(zip(*columns, strict=True)) if columns else [()] * count
        for i, row in zip(indices, rows, strict=True):
            if not (slots := self._slots.get(index(i))):
                raise ValueError(f"Sample {index(i)} was predicted more often than it is in the stock order.")
            self._rows[slots.popleft()] = row

    def batches(self) -> list[Any]:
        """The outputs in stock order: tensors stacked, collections of the same types, one for each stock batch.

        Raises:
            ValueError: If a sample is missing.
        """
        missing = [i for i, row in zip(self._order, self._rows, strict=True) if row is None]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self._order)} samples have no prediction, such as {missing[:5]}.")
        return [self._batch(rows) for rows in self._chunks(self._rows)]

    def batch_indices(self) -> list[list[int]]:
        """The samples of each stock batch."""
        return self._chunks(self._order)

    def _chunks(self, items: list[Any]) -> list[list[Any]]:
        return [items[start : start + self._batch_size] for start in range(0, len(items), self._batch_size)]

    def _batch(self, rows: list[tuple[Any, ...]]) -> Any:
        if self._whole:
            return rows[0][0]
        return self._joined(self._first, (), zip(*rows, strict=True))

    def _columns(self, data: Any, count: int, path: _Path) -> Iterator[Sequence[Any]]:
        """The samples' values of each leaf, in the order of the first batch's leaves."""
        kind = self._kinds[path]
        self._check(data, count, path, kind)
        if isinstance(kind, _Tensors):
            yield data.unbind()
        elif isinstance(kind, _PerSample):
            yield data
        elif isinstance(kind, _Collection):
            parts = parts_of(data) or {}
            for name in kind.names:
                yield from self._columns(parts[name], count, (*path, name))

    def _check(self, data: Any, count: int, path: _Path, kind: _Kind) -> None:
        """Whether a batch is read as the first one was."""
        now = _kind(data, count, path, as_samples=isinstance(kind, _PerSample))
        if isinstance(kind, _Tensors) and isinstance(now, _Tensors) and now.shape != kind.shape:
            raise ValueError(
                f"{_at(path)} has rows of shape {now.shape}, and had rows of shape {kind.shape} in the first batch, so"
                " they cannot be put into one batch again. Return a list of one tensor per sample, each cut to its own"
                f" length; pad all batches to one length; {OFF}."
            )
        if now != kind and not _same_names(now, kind):
            raise ValueError(f"{_at(path)} is {now}, and was {kind} in the first batch. Return the same each time.")

    def _joined(self, first: Any, path: _Path, columns: Iterator[tuple[Any, ...]]) -> Any:
        kind = self._kinds[path]
        if isinstance(kind, _Tensors):
            return torch.stack(next(columns))
        if isinstance(kind, _PerSample):
            return kind.type(next(columns))
        if isinstance(kind, _Nothing):
            return None
        parts = parts_of(first) or {}
        return with_parts(first, {name: self._joined(part, (*path, name), columns) for name, part in parts.items()})


def _same_names(now: _Kind, kind: _Kind) -> bool:
    """Whether two mappings differ in the order of their keys only."""
    return (
        isinstance(now, _Collection)
        and isinstance(kind, _Collection)
        and now.type is kind.type
        and len(now.names) == len(kind.names)
        and set(now.names) == set(kind.names)
    )


def _kinds(data: Any, count: int, path: _Path) -> Iterator[tuple[_Path, _Kind]]:
    """How to read an output, as its first batch tells: for each path in it."""
    kind = _kind(data, count, path, as_samples=isinstance(data, list) and _is_per_sample(data, count, path))
    yield path, kind
    if isinstance(kind, _Collection):
        for name, part in (parts_of(data) or {}).items():
            yield from _kinds(part, count, (*path, name))


def _kind(data: Any, count: int, path: _Path, *, as_samples: bool) -> _Kind:
    if data is None:
        return _Nothing()
    if as_samples and isinstance(data, list) and len(data) == count:
        return _PerSample(type(data))
    if isinstance(data, Tensor) and _splits(data, count):
        return _Tensors(tuple(data.shape[1:]), data.dtype, data.device)
    if (parts := parts_of(data)) is not None:
        return _Collection(type(data), tuple(parts))
    raise ValueError(
        f"{_at(path)} is {_shown(data)}, which does not tell what belongs to which of the {count} samples of its batch."
        f" Return a tensor with one row per sample, or a list with one element per sample, {OFF}."
    )


def _is_per_sample(data: list[Any], count: int, path: _Path) -> bool:
    """Whether a list has one element per sample, rather than one per output.

    Raises:
        ValueError: If it could be either.
    """
    if len(data) != count:
        return False
    elements = [element for element in data if element is not None]
    outputs = bool(elements) and all(_splits(element, count) for element in elements)
    # Logits and a loss are no two samples either.
    alike = len({element.dim() if isinstance(element, Tensor) else None for element in elements}) <= 1
    if outputs or not alike:
        raise ValueError(
            f"{_at(path)} is a list of {count} elements for a batch of {count} samples: one element per sample, or"
            " several outputs of the whole batch? Return several outputs as a tuple or dict; if they are samples, use"
            f" another batch size, {OFF}."
        )
    return True


def _splits(data: Any, count: int) -> bool:
    """Whether data can be split into the rows of its batch."""
    if isinstance(data, Tensor):
        return data.layout is torch.strided and not data.is_nested and data.dim() > 0 and len(data) == count
    if isinstance(data, list) and len(data) == count:
        return True
    parts = [part for part in (parts_of(data) or {}).values() if part is not None]
    return bool(parts) and all(_splits(part, count) for part in parts)


def _shown(data: Any) -> str:
    if not isinstance(data, Tensor):
        return f"{data!r}" if isinstance(data, bool | int | float) else f"a {type(data).__name__}"
    if data.is_nested or data.layout is not torch.strided:
        return f"a tensor of layout {data.layout}"
    return f"a tensor of shape {tuple(data.shape)}"


def _at(path: _Path) -> str:
    return f"The output at `{'.'.join(map(str, path))}`" if path else "The output"
