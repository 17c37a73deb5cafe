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

    Args:
        batch: Any collection. A `pyarrow.RecordBatch` or `Table` becomes a dict of its columns. Numbers and booleans
            without nulls become a tensor with one row per value, and so do lists of one fixed size and fixed-shape
            tensors of them. Other columns, and NumPy arrays of strings or objects, become lists. What is neither NumPy
            nor Arrow stays the object that it is.

    Returns:
        Tensors that share the memory of arrays that may be written, and copies of those that may not, as Arrow's are.
        The dtypes stay.
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
        return {name: _from_arrow(arrow, leaf.column(name)) for name in leaf.schema.names}
    return _from_arrow(arrow, leaf)


def _from_numpy(array: np.ndarray[Any, Any]) -> Any:
    if array.dtype.kind not in "biufc":
        return array.tolist() if array.dtype.kind in "OSUT" else array
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch shares neither memory that is read-only, without a warning, nor such that is walked backwards.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _from_arrow(arrow: Any, column: Any) -> Any:
    types = arrow.types
    if isinstance(column, arrow.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, arrow.ChunkedArray):  # without chunks, before pyarrow 17
        column = arrow.concat_arrays(column.chunks)
    if isinstance(column.type, arrow.FixedShapeTensorType) and not column.null_count:
        return _from_numpy(column.to_numpy_ndarray())
    shape = [len(column)]
    values = column
    while types.is_fixed_size_list(values.type) and not values.null_count:
        shape.append(values.type.list_size)
        values = values.flatten()
    kind = values.type
    if values.null_count or not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        return column.to_pylist()
    return _from_numpy(values.to_numpy(zero_copy_only=False).reshape(shape))
