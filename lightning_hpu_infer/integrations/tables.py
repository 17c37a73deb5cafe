"""Tables in the formats of Ray Data and Spark: cut to batches, as tensors, and with predictions beside their rows."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_hpu_infer.arrays import as_tensors

Table: TypeAlias = Any
"""A dict of arrays, a `pyarrow.Table` or `RecordBatch`, or a `pandas.DataFrame`: none of them is needed for another."""
_Array: TypeAlias = np.ndarray[Any, Any]


def check_columns(columns: Sequence[str] | None) -> None:
    """Refuse one name in place of several: its letters would be taken for names.

    Raises:
        ValueError: If it is one.
    """
    if isinstance(columns, str):
        raise ValueError(f"`columns` must be a list of names, got {columns!r}: pass `columns=[{columns!r}]`.")


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


def tensors(table: Table) -> dict[str, Any]:
    """What a model gets of a table: its columns of numbers as tensors, `(rows, ...)`, all others as lists.

    The types of the columns decide, as in `as_tensors`. pandas has none for vectors: they are objects, and in lists.

    Raises:
        ValueError: If a column of numbers has empty places, for which a tensor has none.
    """
    if isinstance(table, Mapping) or _is_arrow(table):
        return dict(as_tensors(table))
    return {str(name): _of_pandas(str(name), table[name]) for name in table.columns}


def _of_pandas(name: str, series: Any) -> Any:
    # What is neither of a NumPy dtype nor sparse may have empty places, which NumPy's values would not show.
    if isinstance(getattr(series.dtype, "subtype", series.dtype), np.dtype):
        return as_tensors(series.to_numpy())
    import pyarrow as pa

    return as_tensors(pa.table({name: pa.array(series)}))[name]


def columns_of(prediction: Any, rows: int) -> dict[str, "_Array | list[Any]"]:
    """The columns of a prediction: of a mapping its values by their names, of anything else one named `prediction`.

    Args:
        prediction: A tensor, array or list with one entry per row, or a mapping of names to such.
        rows: How many there are.

    Returns:
        Arrays and lists. What NumPy lacks, bfloat16 and float8, becomes float32.

    Raises:
        ValueError: If it has not one entry per row.
    """
    found = prediction if isinstance(prediction, Mapping) else {"prediction": prediction}
    return {str(name): _values(str(name), values, rows) for name, values in found.items()}


def beside(table: Table, prediction: Any, columns: Sequence[str] | None, *, lists: bool = False) -> Table:
    """A table with predictions beside its rows, in the same format.

    Args:
        table: The rows that were predicted.
        prediction: A tensor, array or list with one entry per row, which becomes the column `prediction`, or a mapping
            of names to such, which become columns. What NumPy lacks, bfloat16 and float8, becomes float32. In Arrow,
            types are those of predictions on disk, but rows of more than one boolean are lists of them.
        columns: The columns of the table that are kept; None keeps all.
        lists: Whether rows of more than one number become lists in Arrow, which Spark reads, and not tensors.

    Raises:
        ValueError: If a prediction has not the table's number of rows, or no type of Arrow's where the table is
            Arrow's; or if a column's name is missing or taken.
    """
    rows = rows_of(table)
    new = columns_of(prediction, rows)
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
        arrays = [*(table.column(name) for name in kept), *(_arrow(*each, rows, lists) for each in new.items())]
        return type(table).from_arrays(arrays, names=[*kept, *new])
    # A column of pandas has one dimension; a list of numbers would lose their type.
    flat = {name: list(each) if isinstance(each, np.ndarray) and each.ndim > 1 else each for name, each in new.items()}
    return table[kept].assign(**flat)


def _is_arrow(table: Any) -> bool:
    return type(table).__module__.partition(".")[0] == "pyarrow"


def _names(table: Any) -> list[str]:
    return list(table.schema.names) if _is_arrow(table) else list(table.columns)


def _values(name: str, values: Any, rows: int) -> _Array | list[Any]:
    values = _as_array(values)
    if not isinstance(values, np.ndarray | Sequence) or isinstance(values, str | bytes | np.ma.MaskedArray):
        raise ValueError(
            f"The prediction {name!r} is a {type(values).__name__}: no tensor, array or list of {rows} rows."
        )
    found = values.shape[:1] if isinstance(values, np.ndarray) else (len(values),)
    if found != (rows,):
        shape = tuple(values.shape) if isinstance(values, np.ndarray) else f"{len(values)} entries"
        raise ValueError(f"The prediction {name!r} has not one entry for each of {rows} rows, but {shape}.")
    return values if isinstance(values, np.ndarray) else [_as_array(value) for value in values]


def _as_array(values: Any) -> Any:
    """A tensor as an array of NumPy. Anything else as it is."""
    if not isinstance(values, Tensor):
        return values
    narrow = values.is_floating_point() and (values.dtype == torch.bfloat16 or values.itemsize == 1)
    return (values.float() if narrow else values).numpy(force=True)


def _arrow(name: str, values: _Array | list[Any], rows: int, lists: bool) -> Any:
    import pyarrow as pa

    from lightning_hpu_infer.writing.arrays import array_of

    # Arrow's tensors are made of whole bytes, and its lists not.
    if isinstance(values, list) or values.ndim == 1 or not (lists or values.dtype == bool):
        return array_of(values, rows, name)
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        starts = np.arange(math.prod(values.shape[:axis]) + 1, dtype=np.int32) * values.shape[axis]
        array = pa.ListArray.from_arrays(starts, array)
    return array
