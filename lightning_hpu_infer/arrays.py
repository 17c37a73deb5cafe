"""Batches of NumPy and Arrow as batches of tensors."""

import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_hpu_infer.nested import map_leaves


def as_tensors(batch: Any) -> Any:
    """A batch whose NumPy arrays and Arrow columns are host tensors. Any thread.

    What a column becomes is decided by its type, and so the same for every batch of a dataset.

    Args:
        batch: Any collection. A `pyarrow.RecordBatch` or `Table` becomes a dict of its columns. Numbers and booleans
            become a tensor with one row per value, and so do lists of one fixed size and fixed-shape tensors of them.
            Other columns become lists, those of lists of any length too, and so do NumPy arrays of strings or objects.
            What is neither NumPy nor Arrow stays the object that it is, and NumPy arrays of dates or records do.

    Returns:
        Tensors that share the memory of arrays that may be written, and copies of those that may not, as Arrow's are.
        The dtypes stay.

    Raises:
        ValueError: If values of a tensor are missing, by Arrow's nulls or the mask of a masked array.
    """
    # A batch can only be Arrow's if somebody has imported it.
    arrow = sys.modules.get("pyarrow")
    kinds = (np.ndarray,) if arrow is None else (np.ndarray, *_arrow_kinds(arrow))
    return map_leaves(partial(_converted, arrow), batch, leaf=lambda part: isinstance(part, kinds))


def _arrow_kinds(arrow: Any) -> tuple[type, ...]:
    return arrow.RecordBatch, arrow.Table, arrow.Array, arrow.ChunkedArray


def _converted(arrow: Any, leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, np.ndarray):
        return _from_numpy(leaf)
    if isinstance(leaf, (arrow.RecordBatch, arrow.Table)):
        return {name: _from_arrow(arrow, leaf.column(name), f"The column {name!r}") for name in leaf.schema.names}
    return _from_arrow(arrow, leaf, "A column of Arrow")


def _from_numpy(array: np.ndarray[Any, Any]) -> Any:
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"A masked array of {array.size} values has no tensor: give `.filled(...)` of it.")
    if array.dtype.kind not in "biufc":
        return array.tolist() if array.dtype.kind in "OSUT" else array
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch shares neither memory that is read-only, without a warning, nor such that is walked backwards or by a part
    # of a value, as fields of records may be.
    if not array.flags.behaved or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _from_arrow(arrow: Any, column: Any, what: str) -> Any:
    types, column = arrow.types, _unchunked(arrow, column)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # Ray has a type of tensors of its own beside Arrow's; both have this method.
    read = getattr(column, "to_numpy_ndarray", None)
    values, shape, empty = column if read is None else column.storage, [len(column)], 0
    while types.is_fixed_size_list(values.type) or (read is not None and types.is_nested(values.type)):
        empty += values.null_count
        shape.append(getattr(values.type, "list_size", -1))
        values = values.flatten()
    empty += values.null_count
    kind = values.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        return column.to_pylist()
    if empty:
        raise ValueError(
            f"{what} has {empty} empty places in {len(column)} rows: fill them, or turn the rows into a batch yourself,"
            " for Ray and Spark with `preprocess`. A tensor has no empty places."
        )
    return _from_numpy(values.to_numpy(zero_copy_only=False).reshape(shape) if read is None else read())


def _unchunked(arrow: Any, column: Any) -> Any:
    if not isinstance(column, arrow.ChunkedArray):
        return column
    if column.num_chunks:
        return column.chunk(0) if column.num_chunks == 1 else arrow.concat_arrays(column.chunks)
    if isinstance(column.type, arrow.BaseExtensionType):  # Arrow makes no array of them from a list.
        return column.type.wrap_array(arrow.array([], column.type.storage_type))
    return arrow.array([], column.type)
