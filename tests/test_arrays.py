"""Batches of NumPy and Arrow reach a model as tensors."""

from datetime import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer import InferencePipeline
from lightning_hpu_infer.arrays import as_tensors
from tests.helpers import assert_equal

NUMBERS = np.arange(12, dtype=np.float32).reshape(4, 3)


# Its fields lie where no tensor can: their strides are no multiples of their sizes.
PACKED = np.array([(1, row) for row in NUMBERS], dtype=[("flag", "i1"), ("x", "f4", 3)])


def read_only() -> np.ndarray[Any, Any]:
    array = NUMBERS.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "array",
    [NUMBERS, read_only(), NUMBERS[::-1], NUMBERS.astype(">f4"), NUMBERS.T.copy().T, NUMBERS[:, ::2], PACKED["x"]],
    ids=["plain", "read-only", "backwards", "big-endian", "transposed", "strided", "packed"],
)
def test_numbers_of_numpy_become_tensors(array: np.ndarray[Any, Any]) -> None:
    found = as_tensors({"x": array, "n": [array, 3]})
    assert_equal(found["x"], torch.tensor(array.astype(np.float32).tolist()))
    assert_equal(found["n"][0], found["x"])
    assert found["n"][1] == 3


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float64", "complex64"]
)
def test_dtypes_stay(dtype: str) -> None:
    assert as_tensors(NUMBERS.astype(dtype)).dtype == getattr(torch, dtype)


def test_strings_and_objects_become_lists_and_what_is_neither_stays() -> None:
    assert as_tensors(np.array(["a", "b"])) == ["a", "b"]
    assert as_tensors(np.array([{"a": 1}, None], dtype=object)) == [{"a": 1}, None]
    for batch in ({"x": torch.ones(2), "y": ("text", None)}, "text", object()):
        assert as_tensors(batch) is batch
    dates = np.array(["2024-01-01"], dtype="datetime64[D]")
    assert as_tensors(dates) is dates
    # Equal shapes make no tensor: the next batch may have others.
    vectors = np.empty(2, dtype=object)
    vectors[:] = [np.ones(2), np.ones(2)]
    assert [vector.tolist() for vector in as_tensors(vectors)] == [[1, 1], [1, 1]]


def test_a_masked_array_is_refused() -> None:
    for mask in (False, [True, False]):
        with pytest.raises(ValueError, match=r"masked array of 2 values has no tensor.*`\.filled\(\.\.\.\)`"):
            as_tensors({"x": np.ma.masked_array([1.0, 2.0], mask)})


TENSORS = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(2, 3, 2))
PAIRS = pa.list_(pa.int64(), 2)
COLUMNS: dict[str, tuple[Any, Any]] = {
    "int32": (pa.array([1, 2], pa.int32()), torch.tensor([1, 2], dtype=torch.int32)),
    "float": (pa.array([1.5, 2.0]), torch.tensor([1.5, 2.0], dtype=torch.float64)),
    "half": (pa.array(np.array([1.5, 2.0], np.float16)), torch.tensor([1.5, 2.0], dtype=torch.float16)),
    "bool": (pa.array([True, False]), torch.tensor([True, False])),
    "encoded": (pa.array([7, 5]).dictionary_encode(), torch.tensor([7, 5])),
    "fixed": (pa.array([[1, 2], [4, 5]], PAIRS), torch.tensor([[1, 2], [4, 5]])),
    "no width": (pa.array([[], []], pa.list_(pa.float32(), 0)), torch.empty(2, 0)),
    "nested": (
        pa.array([[[1], [2]], [[3], [4]]], pa.list_(pa.list_(pa.int64(), 1), 2)),
        torch.tensor([[[1], [2]], [[3], [4]]]),
    ),
    "tensor": (TENSORS, torch.arange(12, dtype=torch.float32).reshape(2, 3, 2)),
    "list": (pa.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    "ragged": (pa.array([[1], [2, 3]]), [[1], [2, 3]]),
    "list, nulls": (pa.array([[1, None], None]), [[1, None], None]),
    "nested list": (
        pa.array([[[1], [2]], [[3], None]], pa.list_(pa.list_(pa.int64(), 1), 2)).cast(pa.list_(pa.list_(pa.int64()))),
        [[[1], [2]], [[3], None]],
    ),
    "fixed text": (pa.array([["a", "b"], ["c", None]], pa.list_(pa.string(), 2)), [["a", "b"], ["c", None]]),
    "text": (pa.array(["a", None]), ["a", None]),
    "encoded text": (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
    "nothing": (pa.nulls(2), [None, None]),
    "date": (pa.array([datetime(2024, 1, 2), None], pa.timestamp("us")), [datetime(2024, 1, 2), None]),
    "decimal": (pa.array([Decimal(1), Decimal(2)]), [Decimal(1), Decimal(2)]),
    "struct": (pa.array([{"a": 1}, {"a": 2}]), [{"a": 1}, {"a": 2}]),
}
EMPTY_PLACES: dict[str, tuple[Any, int]] = {
    "numbers": (pa.array([1, None, None]), 2),
    "booleans": (pa.array([True, None]), 1),
    "encoded": (pa.array([1, None]).dictionary_encode(), 1),
    "fixed": (pa.array([[1, 2], None], PAIRS), 1),
    "in fixed": (pa.array([[1, None, 3], [None, 5, 6]], pa.list_(pa.int64(), 3)), 2),
    "in nested": (pa.array([[[1], None], [[3], [None]]], pa.list_(pa.list_(pa.int64(), 1), 2)), 2),
    "in tensors": (pa.fixed_shape_tensor(pa.int64(), [2]).wrap_array(pa.array([[1, None], None], PAIRS)), 2),
}
SCHEMA = list(COLUMNS)


def table() -> pa.Table:
    return pa.table({name: column for name, (column, _) in COLUMNS.items()})


@pytest.mark.parametrize("kind", ["table", "batch", "chunks", "slice", "columns"])
def test_columns_of_arrow_become_tensors_or_lists(kind: str) -> None:
    truth = {name: found for name, (_, found) in COLUMNS.items()}
    batch: Any = {
        "table": table,
        "batch": lambda: table().to_batches()[0],
        "chunks": lambda: pa.concat_tables([table(), table()]),
        "slice": lambda: pa.concat_tables([table(), table()]).slice(2),
        "columns": lambda: {name: column for name, (column, _) in COLUMNS.items()},
    }[kind]()
    found = as_tensors(batch)
    assert list(found) == SCHEMA
    if kind == "chunks":
        truth = {name: torch.cat([each] * 2) if isinstance(each, Tensor) else each * 2 for name, each in truth.items()}
    assert_equal(found, truth)


def test_a_table_without_rows() -> None:
    found = as_tensors(table().slice(0, 0))
    assert found["int32"].shape == (0,)
    assert found["tensor"].shape == (0, 3, 2)
    assert found["text"] == []


@pytest.mark.parametrize("name", COLUMNS)
def test_the_type_of_a_column_decides_and_not_its_values(name: str) -> None:
    column, whole = COLUMNS[name]
    chunks = [pa.chunked_array(parts, column.type) for parts in ([], [column.slice(1, 0)], [column, column.slice(1)])]
    for part in (column.slice(0, 0), column.slice(1), column.slice(0, 1), *chunks):
        found = as_tensors({"x": part})["x"]
        assert type(found) is type(whole)
        assert len(found) == len(part)
        if isinstance(whole, Tensor):
            assert (found.dtype, found.shape[1:]) == (whole.dtype, whole.shape[1:])


@pytest.mark.parametrize("name", EMPTY_PLACES)
def test_a_column_of_numbers_with_empty_places_is_refused(name: str) -> None:
    column, places = EMPTY_PLACES[name]
    after = f" has {places} empty places in {len(column)} rows: fill them"
    with pytest.raises(ValueError, match=f"^The column 'x'{after}"):
        as_tensors(pa.table({"x": column}))
    with pytest.raises(ValueError, match=f"^A column of Arrow{after}"):
        as_tensors([column])
    full = column.slice(0, 1)
    if name in ("numbers", "booleans", "encoded", "fixed"):
        assert isinstance(as_tensors(full), Tensor)  # the others have some in their first row


class Mean(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"].mean(1) + batch["y"]


def test_a_pipeline_takes_any_of_them_and_changes_none(device: str) -> None:
    y = np.arange(4, dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(NUMBERS.ravel()), 3)
    batches: list[Any] = [
        {"x": torch.tensor(NUMBERS), "y": torch.tensor(y)},
        {"x": read_only(), "y": y},
        pa.table({"x": column, "y": pa.array(y)}),
        pa.record_batch({"x": column, "y": pa.array(y)}),
    ]
    truth = torch.tensor(NUMBERS.mean(1) + y)
    with InferencePipeline(Mean()) as pipeline:
        assert_equal(list(pipeline.predict(batches)), [truth] * 4)
        assert_equal([pipeline.submit(batch).result(60) for batch in batches], [truth] * 4)
    assert column.flatten().to_pylist() == NUMBERS.ravel().tolist()
