"""Tables in the formats of Ray Data and Spark: cut to batches, as tensors, and with predictions beside their rows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

Table: TypeAlias = Any
"""A dict of arrays, a `pyarrow.Table` or `RecordBatch`, or a `pandas.DataFrame`: none of them is needed for another."""
_Array: TypeAlias = np.ndarray[Any, Any]
_NUMBERS = "biufc"


def rows_of(table: Table) -> int:
    """The number of rows of a table."""
    if isinstance(table, Mapping):
        return len(next(iter(table.values()), ()))
    return int(table.shape[0])


def pieces(table: Table, rows: int | None) -> Iterator[Table]:
    """A table in pieces of so many rows, the last one perhaps shorter; None leaves it whole. Copies nothing."""
    size = rows_of(table)
    for start in range(0, size, rows or max(size, 1)):
        stop = min(start + (rows or size), size)
        if isinstance(table, Mapping):
            yield {name: values[start:stop] for name, values in table.items()}
        elif _is_arrow(table):
            yield table.slice(start, stop - start)
        else:
            yield table.iloc[start:stop]


def tensors(table: Table) -> dict[str, Tensor | list[Any]]:
    """What a model gets of a table: its columns of numbers as tensors, `(rows, ...)`, all others as lists.

    Raises:
        ValueError: If a column of numbers has empty places, for which a tensor has none.
    """
    return {name: as_tensor(values) for name, values in _columns(table)}


def as_tensor(values: _Array) -> Tensor | list[Any]:
    """An array of numbers as a tensor, in memory of its own if nobody may write that of the array; others as a list."""
    if values.dtype == object and len(values) and all(isinstance(value, np.ndarray) for value in values):
        shapes = {(value.shape, value.dtype) for value in values}
        values = np.stack(list(values)) if len(shapes) == 1 else values
    if values.dtype.kind not in _NUMBERS:
        return cast(list[Any], values.tolist())
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    # Ray's batches are read-only views of memory that all processes of a machine share.
    return torch.from_numpy(np.require(native, requirements=["C", "W"]))


def as_array(values: Any) -> Any:
    """A tensor as an array of NumPy, which has no bfloat16: it becomes float32. Anything else as it is."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def beside(table: Table, prediction: Any, columns: Sequence[str] | None, *, lists: bool = False) -> Table:
    """A table with predictions beside its rows, in the same format.

    Args:
        table: The rows that were predicted.
        prediction: A tensor, array or list with one entry per row, which becomes the column `prediction`, or a mapping
            of names to such, which become columns. bfloat16 becomes float32, which NumPy has.
        columns: The columns of the table that are kept; None keeps all.
        lists: Whether rows of more than one number become lists in Arrow, which Spark reads, and not tensors.

    Raises:
        ValueError: If a prediction has not the table's number of rows, or a column's name is missing or taken.
    """
    found = prediction if isinstance(prediction, Mapping) else {"prediction": prediction}
    new = {str(name): _values(str(name), values, rows_of(table)) for name, values in found.items()}
    names = list(table.keys()) if isinstance(table, Mapping) else _names(table)
    kept = names if columns is None else list(columns)
    if missing := [name for name in kept if name not in names]:
        raise ValueError(f"The columns {missing} are to be kept, but the table has {names} only.")
    if taken := sorted(set(kept) & set(new)):
        raise ValueError(
            f"The columns {taken} are both in the table and in the prediction. Name those to keep in `columns`, or let"
            " the model return a dict with other names."
        )
    if isinstance(table, Mapping):
        return {**{name: table[name] for name in kept}, **new}
    if _is_arrow(table):
        arrays = [*(table.column(name) for name in kept), *(_arrow(values, lists) for values in new.values())]
        return type(table).from_arrays(arrays, names=[*kept, *new])
    # A column of pandas has one dimension; a list of numbers would lose their type.
    return table[kept].assign(**{name: list(values) if np.ndim(values) > 1 else values for name, values in new.items()})


def _is_arrow(table: Any) -> bool:
    return type(table).__module__.partition(".")[0] == "pyarrow"


def _names(table: Any) -> list[str]:
    return list(table.schema.names) if _is_arrow(table) else list(table.columns)


def _columns(table: Table) -> Iterator[tuple[str, _Array]]:
    if isinstance(table, Mapping):
        yield from ((name, np.asarray(values)) for name, values in table.items())
    elif _is_arrow(table):
        yield from ((name, _from_arrow(name, table.column(name))) for name in table.schema.names)
    else:
        yield from ((str(name), table[name].to_numpy()) for name in table.columns)


def _from_arrow(name: str, column: Any) -> _Array:
    import pyarrow as pa

    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    kind = array.type
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if (numbers or isinstance(array, pa.ExtensionArray)) and array.null_count:
        raise ValueError(
            f"The column {name!r} has {array.null_count} empty places of {len(array)}: fill them, or turn the table"
            " into a batch yourself with `preprocess`."
        )
    # Ray has a type of tensors of its own beside Arrow's; both have this method.
    read = getattr(array, "to_numpy_ndarray", None)
    return np.asarray(array.to_numpy(zero_copy_only=False) if read is None else read())


def _values(name: str, values: Any, rows: int) -> _Array | list[Any]:
    values = as_array(values)
    if not isinstance(values, np.ndarray | Sequence) or isinstance(values, str):
        raise ValueError(
            f"The prediction {name!r} is a {type(values).__name__}: no tensor, array or list of {rows} rows."
        )
    found = values.shape[:1] if isinstance(values, np.ndarray) else (len(values),)
    if found != (rows,):
        shape = tuple(values.shape) if isinstance(values, np.ndarray) else f"{len(values)} entries"
        raise ValueError(f"The prediction {name!r} has not one entry for each of {rows} rows, but {shape}.")
    return values if isinstance(values, np.ndarray) else list(values)


def _arrow(values: _Array | list[Any], lists: bool) -> Any:
    import pyarrow as pa

    if isinstance(values, list) or values.ndim == 1:
        return pa.array(values)
    values = np.ascontiguousarray(values)
    if not lists:
        return pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    array = pa.array(values.reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        starts = np.arange(math.prod(values.shape[:axis]) + 1, dtype=np.int32) * values.shape[axis]
        array = pa.ListArray.from_arrays(starts, array)
    return array
