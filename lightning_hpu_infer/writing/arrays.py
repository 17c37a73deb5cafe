"""What a step returned, as Arrow arrays with one value per sample. Nothing shares memory with what it was made of."""

from collections import UserList, deque
from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_hpu_infer.nested import parts_of
from lightning_hpu_infer.writing.leaves import UnfitError, leaves, of_numpy

_PLAIN = (bool, int, float, str, bytes)


def array_of(value: Any, rows: int, column: str) -> pa.Array:
    """A value for a batch as one column.

    Args:
        value: A tensor or NumPy array whose dimension 0 is the samples; a list or tuple with one value per sample; a
            mapping, dataclass or namedtuple of such, which becomes a struct; or None, for no values.
        rows: Samples of the batch.
        column: Its name, for errors.

    Returns:
        `rows` values. Tensors of one dimension become numbers, those of more fixed-shape tensors; in lists, where their
        shapes may differ, they become lists. Types that Arrow lacks are replaced by ones that hold them exactly:
        bfloat16 and float8 by float32; complex numbers by a last dimension with real and imaginary part; booleans in
        fixed-shape tensors by uint8.

    Raises:
        UnfitError: If it has not `rows` values, or values that have no type of Arrow's.
    """
    value = _unpacked(value)
    if value is None:
        return pa.nulls(rows)
    if isinstance(value, Tensor | np.ndarray):
        return _dense(_numpy(value, column), rows, column)
    if is_sequence(value):
        if len(value) != rows:
            raise UnfitError(
                f"Column {column!r} is a {type(value).__name__} of {len(value)} for a batch of {rows} samples. Return"
                " one value per sample, or a dict of what are to be columns."
            )
        return _per_sample(list(value), column)
    if (parts := parts_of(value)) is None:
        raise UnfitError(
            f"Column {column!r} is {_shown(value)}, one value for a batch of {rows} samples. Return one per sample, or"
            " leave it out with `columns`."
        )
    children = {name: array_of(part, rows, f"{column}.{name}") for name, part in by_name(parts, column).items()}
    return _struct(children, rows, None)


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list or the like: no namedtuple, whose parts are fields."""
    return isinstance(value, list | tuple | deque | UserList) and not hasattr(value, "_fields")


def by_name(parts: dict[Any, Any], column: str) -> dict[str, Any]:
    """Parts under their names as strings.

    Raises:
        UnfitError: If two are the same.
    """
    named = {str(name): part for name, part in parts.items()}
    if len(named) < len(parts):
        raise UnfitError(f"{column!r} has several parts of one name: {', '.join(map(repr, parts))}.")
    return named


def _unpacked(value: Any) -> Any:
    """Lists in place of what holds its samples one by one."""
    if isinstance(value, Tensor) and value.is_nested:
        return list(value.unbind())
    if isinstance(value, set | frozenset):
        return list(value)
    if isinstance(value, np.ndarray) and value.dtype.kind not in ("biufcMm" if value.ndim == 1 else "biufc"):
        return value.tolist() if value.dtype.kind in "OUS" and value.ndim else list(value) if value.ndim else value[()]
    return value


def _numpy(value: Tensor | NDArray[Any], column: str) -> NDArray[Any]:
    """A C-contiguous copy in the host's memory, of a type that Arrow has."""
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray):
            raise UnfitError(f"Column {column!r} is a masked array. Return `.filled(...)`, or a list with None.")
        if value.dtype.kind == "c":
            value = np.stack([value.real, value.imag], axis=-1)
        return np.array(value, dtype=value.dtype.newbyteorder("="), order="C", copy=True)
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        way = "dequantize" if tensor.is_quantized else "to_dense"
        raise UnfitError(f"Column {column!r} is a {kind} tensor. Return `.{way}()` of it.")
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    narrow = tensor.is_floating_point() and (tensor.dtype == torch.bfloat16 or tensor.itemsize == 1)
    dtype = torch.float32 if narrow else tensor.dtype
    try:
        array = tensor.to("cpu", dtype).resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise UnfitError(f"Column {column!r} is a tensor of {tensor.dtype}, which has no type of Arrow's.") from error
    shared = tensor.device.type == "cpu" and tensor.dtype == dtype
    # NumPy copies in this thread: torch's threads are busy with the model.
    return np.array(array, order="C", copy=True) if shared else np.ascontiguousarray(array)


def _dense(array: NDArray[Any], rows: int, column: str) -> pa.Array:
    if not array.ndim or array.shape[0] != rows:
        raise UnfitError(
            f"Column {column!r} has shape {list(array.shape)}, and the batch has {rows} samples. Its dimension 0 has to"
            " be the samples. Return one value per sample, or leave it out with `columns`."
        )
    shape = array.shape[1:]
    if not shape:
        return of_numpy(array, column)
    if not prod(shape):
        raise UnfitError(
            f"Column {column!r} has shape {list(array.shape)}, which holds no values. Return a list with one tensor per"
            " sample if their sizes vary."
        )
    # Arrow's tensors are made of whole bytes.
    values = of_numpy((array.view(np.uint8) if array.dtype == bool else array).reshape(-1), column)
    storage = pa.FixedSizeListArray.from_arrays(values, prod(shape))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(values.type, shape), storage)


def _per_sample(values: list[Any], column: str) -> pa.Array:
    first = next((value for value in values if value is not None), None)
    if first is None:
        return pa.nulls(len(values))
    if isinstance(first, _PLAIN):
        return leaves(values, column)
    values = [_unpacked(value) for value in values]
    kinds = {_kind(value) for value in values if value is not None}
    if len(kinds) > 1:
        raise UnfitError(f"Column {column!r} holds values of several kinds: {' and '.join(sorted(kinds))}.")
    missing = np.array([value is None for value in values])
    mask = missing if missing.any() else None
    (kind,) = kinds
    if kind == "tensors":
        return _ragged([None if value is None else _numpy(value, column) for value in values], mask, column)
    if kind == "lists":
        lengths = np.array([len(value or ()) for value in values])
        return _lists(_per_sample(list(chain.from_iterable(value or () for value in values)), column), lengths, mask)
    if kind == "dicts":
        parts = [by_name(parts_of(value) or {}, column) for value in values]
        names = dict.fromkeys(chain.from_iterable(parts))
        children = {name: _per_sample([part.get(name) for part in parts], f"{column}.{name}") for name in names}
        return _struct(children, len(values), mask)
    return leaves(values, column)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return "tensors"
    if is_sequence(value):
        return "lists"
    return "values" if parts_of(value) is None else "dicts"


def _ragged(arrays: list[NDArray[Any] | None], mask: NDArray[Any] | None, column: str) -> pa.Array:
    present = [array for array in arrays if array is not None]
    dtype, dims = present[0].dtype, present[0].ndim
    if any((array.dtype, array.ndim) != (dtype, dims) for array in present):
        kinds = sorted({f"{array.dtype} of {array.ndim} dimensions" for array in present})
        raise UnfitError(f"Column {column!r} holds tensors of several kinds: {', '.join(kinds)}.")
    filled = [np.zeros((0,) * dims if dims else (), dtype) if array is None else array for array in arrays]
    if not dims:
        return of_numpy(np.stack(filled), column, mask)
    array = of_numpy(np.concatenate([each.reshape(-1) for each in filled]), column)
    for axis in reversed(range(dims)):
        lengths = np.repeat([each.shape[axis] for each in filled], [prod(each.shape[:axis]) for each in filled])
        array = _lists(array, lengths, None if axis else mask)
    return array


def _lists(values: pa.Array, lengths: NDArray[Any], mask: NDArray[Any] | None) -> pa.Array:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, mask=None if mask is None else pa.array(mask))


def _struct(children: dict[str, pa.Array], rows: int, mask: NDArray[Any] | None) -> pa.Array:
    if not children:  # Parquet has no structs without fields.
        return pa.nulls(rows)
    fields = [pa.field(name, child.type) for name, child in children.items()]
    return pa.StructArray.from_arrays(
        list(children.values()), fields=fields, mask=None if mask is None else pa.array(mask)
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
