"""Batches of NumPy and Arrow reach a model as tensors."""

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


def read_only() -> np.ndarray[Any, Any]:
    array = NUMBERS.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "array",
    [NUMBERS, read_only(), NUMBERS[::-1], NUMBERS.astype(">f4"), NUMBERS.T.copy().T, NUMBERS[:, ::2]],
    ids=["plain", "read-only", "backwards", "big-endian", "transposed", "strided"],
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


TENSORS = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.float32).reshape(2, 3, 2))
COLUMNS: dict[str, tuple[Any, Any]] = {
    "int32": (pa.array([1, 2], pa.int32()), torch.tensor([1, 2], dtype=torch.int32)),
    "float": (pa.array([1.5, 2.0]), torch.tensor([1.5, 2.0], dtype=torch.float64)),
    "half": (pa.array(np.array([1.5, 2.0], np.float16)), torch.tensor([1.5, 2.0], dtype=torch.float16)),
    "bool": (pa.array([True, False]), torch.tensor([True, False])),
    "fixed": (pa.array([[1, 2, 3], [4, 5, 6]], pa.list_(pa.int64(), 3)), torch.tensor([[1, 2, 3], [4, 5, 6]])),
    "nested": (
        pa.array([[[1], [2]], [[3], [4]]], pa.list_(pa.list_(pa.int64(), 1), 2)),
        torch.tensor([[[1], [2]], [[3], [4]]]),
    ),
    "tensor": (TENSORS, torch.arange(12, dtype=torch.float32).reshape(2, 3, 2)),
    "ragged": (pa.array([[1], [2, 3]]), [[1], [2, 3]]),
    "nulls": (pa.array([1, None]), [1, None]),
    "text": (pa.array(["a", None]), ["a", None]),
    "struct": (pa.array([{"a": 1}, {"a": 2}]), [{"a": 1}, {"a": 2}]),
    "fixed nulls": (pa.array([[1, 2], None], pa.list_(pa.int64(), 2)), [[1, 2], None]),
    "inner nulls": (pa.array([[1, None], [3, 4]], pa.list_(pa.int64(), 2)), [[1, None], [3, 4]]),
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
