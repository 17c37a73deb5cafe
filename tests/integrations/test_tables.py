"""Tables of three formats: cut, as tensors, and with predictions beside their rows."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from lightning_hpu_infer.integrations.tables import beside, pieces, rows_of, tensors

FORMATS = ["numpy", "table", "batch", "pandas"]
VECTORS = np.arange(10, dtype=np.float32).reshape(5, 2)


def table_of(kind: str) -> Any:
    """Five rows: a name, a number, and a vector."""
    names, numbers = ["a", "b", "c", "d", "e"], np.arange(5)
    if kind == "numpy":
        return {"name": np.array(names, object), "number": numbers, "vector": VECTORS}
    if kind == "pandas":
        return pd.DataFrame({"name": names, "number": numbers, "vector": list(VECTORS)}, index=[7, 7, 1, 2, 3])
    arrow = pa.RecordBatch if kind == "batch" else pa.Table
    vectors = pa.FixedShapeTensorArray.from_numpy_ndarray(VECTORS)
    return arrow.from_arrays([pa.array(names), pa.array(numbers), vectors], names=["name", "number", "vector"])


def column(table: Any, name: str) -> list[Any]:
    values = table[name] if not isinstance(table, pa.RecordBatch) else table.column(name)
    found = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else list(values)
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in found]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [1, 2, 5, 9, None])
def test_pieces_are_the_rows_in_order(kind: str, size: int | None) -> None:
    found = list(pieces(table_of(kind), size))
    assert [rows_of(piece) for piece in found] == {1: [1] * 5, 2: [2, 2, 1]}.get(size or 5, [5])
    assert [name for piece in found for name in column(piece, "name")] == ["a", "b", "c", "d", "e"]
    assert {type(piece) for piece in found} == {type(table_of(kind))}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [2, None])
def test_numbers_become_tensors_and_others_lists(kind: str, size: int | None) -> None:
    batch = tensors(list(pieces(table_of(kind), size))[-1])
    first = 0 if size is None else 4
    assert list(batch) == ["name", "number", "vector"]
    assert batch["name"] == ["a", "b", "c", "d", "e"][first:]
    torch.testing.assert_close(batch["number"], torch.arange(5)[first:])
    # pandas has no type for vectors.
    vectors = batch["vector"]
    assert isinstance(vectors, list) == (kind == "pandas")
    torch.testing.assert_close(torch.as_tensor(np.asarray(vectors)), torch.from_numpy(VECTORS[first:]))


def test_a_tensor_has_memory_of_its_own_where_nobody_may_write() -> None:
    shared = VECTORS.copy()
    shared.flags.writeable = False
    tensors({"x": shared})["x"].zero_()
    np.testing.assert_array_equal(shared, VECTORS)


def pandas_of(values: list[Any], dtype: Any) -> pd.DataFrame:
    return pd.DataFrame({"filler": [0] * len(values), 7: pd.Series(values, dtype=dtype)})


PANDAS: dict[str, tuple[list[Any], Any, Any]] = {
    "numpy": ([1, 2], "int32", torch.tensor([1, 2], dtype=torch.int32)),
    "NaN": ([1.0, np.nan], "float64", torch.tensor([1.0, np.nan], dtype=torch.float64)),
    "nullable": ([1, 2], "Int64", torch.tensor([1, 2])),
    "nullable boolean": ([True, False], "boolean", torch.tensor([True, False])),
    "arrow": ([1, 2], "int64[pyarrow]", torch.tensor([1, 2])),
    "arrow pairs": ([[1, 2], [3, 4]], pd.ArrowDtype(pa.list_(pa.int64(), 2)), torch.tensor([[1, 2], [3, 4]])),
    "arrow lists": ([[1, 2], [3, 4]], pd.ArrowDtype(pa.list_(pa.int64())), [[1, 2], [3, 4]]),
    "text": (["a", None], "str", ["a", None]),
    "category": (["b", "a"], "category", ["b", "a"]),
    "objects": ([[1, 2], None], "object", [[1, 2], None]),
    "sparse": ([0, 1], pd.SparseDtype("int64"), torch.tensor([0, 1])),
}


@pytest.mark.parametrize("name", PANDAS)
def test_the_type_of_a_column_of_pandas_decides(name: str) -> None:
    values, dtype, expected = PANDAS[name]
    table = pandas_of(values, dtype)
    for found, rows in ((tensors(table)["7"], expected), (tensors(table.iloc[1:])["7"], expected[1:])):
        if isinstance(rows, Tensor):
            torch.testing.assert_close(found, rows, equal_nan=True)
        else:
            assert found == rows


@pytest.mark.parametrize("dtype", ["Int64", "Float64", "boolean", "int64[pyarrow]", "category"])
def test_empty_places_in_pandas_are_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=r"The column '7' has 1 empty places in 2 rows: fill them, .*`preprocess`"):
        tensors(pandas_of([1, None], dtype))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("columns", [None, ["number"], []])
def test_predictions_stand_beside_their_rows(kind: str, columns: list[str] | None) -> None:
    table = table_of(kind)
    scores = torch.arange(15.0, dtype=torch.bfloat16).reshape(5, 3)
    found = beside(table, {"score": scores, "best": scores[:, 0].half(), "word": list("vwxyz")}, columns)
    assert type(found) is type(table)
    assert column(found, "score") == scores.tolist()
    assert column(found, "best") == scores[:, 0].tolist()
    assert column(found, "word") == list("vwxyz")
    for name in ["name", "number", "vector"] if columns is None else columns:
        assert column(found, name) == column(table, name)
    kept = 3 if columns is None else len(columns)
    assert len(found.schema.names if kind in ("table", "batch") else found.keys()) == kept + 3


def test_the_type_of_a_prediction_is_kept() -> None:
    for kind in ("numpy", "pandas"):
        found = beside(table_of(kind), torch.ones(5, dtype=torch.float32), [])
        assert found["prediction"].dtype == np.float32
    arrow = beside(table_of("table"), torch.ones(5, 3), [])
    assert arrow.schema.field(0).type == pa.fixed_shape_tensor(pa.float32(), [3])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "made",
    [
        [[1, 2], [3], [], [4], [5]],
        [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]],
        [torch.ones(length, dtype=torch.bfloat16) for length in (1, 2, 0, 1, 3)],
        tuple(torch.ones(2) for _ in range(5)),
        [{"box": [1, 2]}, {"box": [3]}, {"box": []}, {"box": [4]}, {"box": [5]}],
        ["a", "b", "", "d", "e"],
    ],
    ids=["ragged", "lists", "ragged tensors", "tensors", "dicts", "text"],
)
def test_lists_stand_beside_their_rows(kind: str, made: Any) -> None:
    found = column(beside(table_of(kind), {"made": made}, ["number"]), "made")
    assert found == [value.tolist() if isinstance(value, Tensor) else value for value in made]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16", "bool", "uint8", "int64"])
def test_values_of_each_dtype_are_kept(kind: str, dtype: str) -> None:
    values = torch.tensor([[0, 1]] * 5).to(getattr(torch, dtype))
    for made in (values, values[:, 0]):
        found = column(beside(table_of(kind), made, []), "prediction")
        assert found == made.tolist()
        assert isinstance(np.array(found).flat[0], np.bool) == (dtype == "bool")


def test_vectors_without_values_are_refused_where_arrow_has_none() -> None:
    with pytest.raises(ValueError, match=r"shape \[5, 0\], which holds no values"):
        beside(table_of("table"), torch.ones(5, 0), None)
    found = beside(table_of("batch"), torch.ones(5, 0), None, lists=True)
    assert column(found, "prediction") == [[]] * 5
    assert column(beside(table_of("numpy"), torch.ones(5, 0), None), "prediction") == [[]] * 5


def test_spark_gets_lists() -> None:
    values = torch.arange(30.0).reshape(5, 2, 3)
    found = beside(table_of("batch"), values, ["name"], lists=True)
    assert found.schema.field("prediction").type == pa.list_(pa.list_(pa.float32()))
    assert column(found, "prediction") == values.tolist()


@pytest.mark.parametrize("kind", FORMATS)
def test_what_does_not_fit_the_rows_is_refused(kind: str) -> None:
    table = table_of(kind)
    with pytest.raises(ValueError, match=r"'prediction' has not one entry for each of 5 rows, but \(4, 3\)"):
        beside(table, torch.ones(4, 3), None)
    with pytest.raises(ValueError, match=r"'a' has not one entry for each of 5 rows, but \(\)"):
        beside(table, {"a": torch.tensor(1.0)}, None)
    with pytest.raises(ValueError, match="'prediction' has not one entry for each of 5 rows, but 2 entries"):
        beside(table, ["x", "y"], None)
    with pytest.raises(ValueError, match="'prediction' is a float: no tensor, array or list of 5 rows"):
        beside(table, 1.0, None)
    with pytest.raises(ValueError, match="'prediction' is a MaskedArray: no tensor, array or list of 5 rows"):
        beside(table, np.ma.masked_array(np.ones(5), [True] * 5), None)  # the mask would be lost
    with pytest.raises(ValueError, match=r"\['name'\] are both in the table and in the prediction"):
        beside(table, {"name": torch.ones(5)}, None)
    with pytest.raises(ValueError, match=r"\['nothing'\] are to be kept, but the table has \['name', "):
        beside(table, torch.ones(5), ["nothing"])
