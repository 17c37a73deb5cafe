"""Whatever a step returns becomes columns, or an error that says which column does not fit."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers.utils.generic import ModelOutput

from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.schemas import united

Pair = namedtuple("Pair", ["score", "label"])


@dataclass
class Result:
    score: torch.Tensor
    nested: dict[str, torch.Tensor]


@dataclass
class Output(ModelOutput):
    score: Any = None
    label: Any = None
    cache: Any = None


def written(prediction: Any, rows: int = 3, **options: Any) -> pa.RecordBatch:
    return Columns(**options).batch(prediction, rows, range(rows), 0)


def column(prediction: Any, rows: int = 3, name: str = "prediction") -> Any:
    return written(prediction, rows)[name]


def test_the_position_comes_first() -> None:
    batch = Columns().batch(torch.zeros(3), 3, [7, 8, 9], 2, ids=["a", "b", "c"])
    assert batch.schema.names == ["index", "dataloader_idx", "id", "prediction"]
    assert batch.schema.types == [pa.int64(), pa.int32(), pa.string(), pa.float32()]
    assert batch["index"].to_pylist() == [7, 8, 9]
    assert batch["dataloader_idx"].to_pylist() == [2, 2, 2]


def test_a_tensor_is_a_column_and_more_dimensions_are_tensors_of_arrows() -> None:
    tensor = torch.arange(24.0).reshape(3, 2, 4)
    array = column(tensor)
    assert array.type == pa.fixed_shape_tensor(pa.float32(), (2, 4))
    assert np.array_equal(array.to_numpy_ndarray(), tensor.numpy())


def test_strides_do_not_matter() -> None:
    tensor = torch.arange(24).reshape(4, 2, 3).permute(2, 0, 1)
    assert np.array_equal(column(tensor).to_numpy_ndarray(), tensor.numpy())
    assert column(torch.arange(6)[::2]).to_pylist() == [0, 2, 4]


@pytest.mark.parametrize("kind", ["tensor", "rows", "complex", "bool", "numpy", "list of tensors"])
def test_nothing_is_shared_with_the_prediction(kind: str) -> None:
    tensor = torch.ones(3, 2) if kind != "rows" else torch.ones(3)
    tensor = tensor.to({"complex": torch.complex64, "bool": torch.bool}.get(kind, torch.float32))
    prediction = {"numpy": tensor.numpy(), "list of tensors": list(tensor)}.get(kind, tensor)
    array = column(prediction)
    expected = array.to_pylist()
    tensor.zero_()
    assert array.to_pylist() == expected


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bool, pa.bool_()),
        (torch.uint8, pa.uint8()),
        (torch.int16, pa.int16()),
        (torch.int64, pa.int64()),
        (torch.uint64, pa.uint64()),
        (torch.float16, pa.float16()),
        (torch.bfloat16, pa.float32()),
        (torch.float8_e4m3fn, pa.float32()),
        (torch.float8_e5m2, pa.float32()),
        (torch.float64, pa.float64()),
        (torch.complex64, pa.fixed_shape_tensor(pa.float32(), (2,))),
    ],
)
def test_types(dtype: torch.dtype, expected: pa.DataType) -> None:
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    array = column(tensor)
    assert array.type == expected
    if not dtype.is_complex:
        assert array.to_pylist() == tensor.tolist()


def test_complex_numbers_are_pairs() -> None:
    tensor = torch.tensor([[1 + 2j, 3 - 4j]] * 3)
    assert np.array_equal(column(tensor.conj()).to_numpy_ndarray(), torch.view_as_real(tensor.conj().resolve_conj()))
    assert np.array_equal(column(tensor.numpy()).to_numpy_ndarray(), torch.view_as_real(tensor))


def test_truths_of_several_dimensions_are_bytes() -> None:
    array = column(torch.tensor([[True, False]] * 3))
    assert array.type == pa.fixed_shape_tensor(pa.uint8(), (2,))
    assert array.to_numpy_ndarray().tolist() == [[1, 0]] * 3


@pytest.mark.parametrize(
    "prediction",
    [
        {"score": torch.arange(3.0), "label": ["x", "y", None]},
        Pair(torch.arange(3.0), ["x", "y", None]),
        Output(score=torch.arange(3.0), label=["x", "y", None]),
        [{"score": float(i), "label": label} for i, label in enumerate(["x", "y", None])],
        [Pair(float(i), label) for i, label in enumerate(["x", "y", None])],
        [{"score": 0.0, "label": "x"}, {"score": 1.0, "label": "y"}, {"score": 2.0}],
    ],
    ids=["dict", "namedtuple", "ModelOutput", "list of dicts", "list of namedtuples", "key left out"],
)
def test_parts_become_columns(prediction: Any) -> None:
    batch = written(prediction)
    assert batch.schema.names == ["index", "dataloader_idx", "score", "label"]
    assert batch["score"].to_pylist() == [0.0, 1.0, 2.0]
    assert batch["label"].to_pylist() == ["x", "y", None]


def test_nested_parts_become_structs() -> None:
    prediction = Result(torch.arange(3), {"x": torch.ones(3, 2), "y": torch.zeros(3)})
    array = column(prediction, name="nested")
    assert pa.types.is_struct(array.type)
    assert array.type.field("x").type == pa.fixed_shape_tensor(pa.float32(), (2,))
    assert array.field("y").to_pylist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2, None], pa.int64()),
        (["a", None, "b"], pa.string()),
        ([b"a", None, b"b"], pa.binary()),
        ([[1], [], [2, 3]], pa.list_(pa.int64())),
        ([["a", "b"], None, []], pa.list_(pa.string())),
        ([{"x": [1]}, None, {"x": [2, 3]}], None),
        ([None, None, None], pa.null()),
    ],
)
def test_values_per_sample(values: list[Any], kind: pa.DataType | None) -> None:
    array = column({"value": values}, name="value")
    assert kind is None or array.type == kind
    assert array.to_pylist() == values


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.bool])
def test_tensors_per_sample_may_vary_in_shape(dtype: torch.dtype) -> None:
    tensors = [torch.ones(2, 3), torch.ones(0, 3), torch.ones(4, 1)]
    array = column([tensor.to(dtype) for tensor in tensors])
    assert array.to_pylist() == [tensor.to(dtype).tolist() for tensor in tensors]


def test_equal_shapes_in_one_batch_make_no_other_type() -> None:
    columns = Columns()
    columns.batch([torch.ones(2), torch.ones(2)], 2, range(2), 0)
    assert columns.batch([torch.ones(1), torch.ones(5)], 2, range(2), 0)["prediction"].to_pylist() == [[1.0], [1.0] * 5]


def test_other_lists_of_tensors() -> None:
    assert column([torch.tensor(1), None, torch.tensor(3)]).to_pylist() == [1, None, 3]
    assert column([torch.ones(2), None, torch.ones(0)]).to_pylist() == [[1.0, 1.0], None, []]
    assert column([[torch.ones(1)], [], [torch.ones(2), torch.ones(0)]]).to_pylist() == [[[1.0]], [], [[1.0, 1.0], []]]
    assert column([np.ones(2), np.ones(1), np.ones(0)]).to_pylist() == [[1.0, 1.0], [1.0], []]
    jagged = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    assert column(jagged, 2).to_pylist() == [[1.0], [1.0, 1.0]]


def test_arrays_of_numpy() -> None:
    assert column(np.array(["a", "b", "c"])).to_pylist() == ["a", "b", "c"]
    assert column({"a": np.array([{"x": 1}, None, {"x": 2}], dtype=object)}, name="a").to_pylist()[2] == {"x": 2}
    assert column(np.arange(3, dtype=">i4")).to_pylist() == [0, 1, 2]


def test_columns_are_chosen_and_renamed() -> None:
    prediction = {"index": torch.zeros(3), "logits": torch.ones(3), "cache": object()}
    assert written(prediction, columns=["logits"]).schema.names == ["index", "dataloader_idx", "logits"]
    batch = written(prediction, columns={"logits": "score", "index": "place"})
    assert batch.schema.names == ["index", "dataloader_idx", "score", "place"]


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        (torch.tensor(1.0), r"'prediction' has shape \[\], and the batch has 3 samples"),
        (torch.ones(2, 3), r"'prediction' has shape \[2, 3\], and the batch has 3 samples"),
        ({"loss": torch.tensor(1.0)}, r"'loss' has shape \[\]"),
        ({"a": {"b": torch.ones(2)}}, r"'a.b' has shape \[2\]"),
        ({"name": "x"}, "'name' is 'x', one value for a batch of 3 samples"),
        ([1, 2], "'prediction' is a list of 2 for a batch of 3 samples"),
        ((torch.ones(3), torch.ones(3)), "'prediction' is a tuple of 2 for a batch of 3"),
        ((torch.ones(3), torch.ones(3), torch.ones(3)), "could be one tensor per sample or several"),
        ({"index": torch.ones(3)}, "'index' is the writer's own"),
        ({1: [1, 2, 3], "1": [1, 2, 3]}, "several parts of one name"),
        ([1, "a", 2], "'prediction' holds values of several kinds: numbers and strings"),
        ([object()] * 3, "'prediction' has no type of Arrow's"),
        ([[1], {"x": 1}, 2], "values of several kinds: dicts and lists and values"),
        ([torch.ones(1), torch.ones(1, 1), torch.ones(1)], "tensors of several kinds"),
        ([torch.ones(1), torch.ones(1).int(), torch.ones(1)], "float32 of 1 dimensions, int32 of 1 dimensions"),
        (torch.ones(3, 0), "holds no values"),
        (torch.eye(3).to_sparse(), r"sparse_coo tensor. Return `.to_dense\(\)`"),
        (np.ma.masked_array(np.ones(3), [True, False, True]), "masked"),
    ],
)
def test_what_is_no_column_is_an_error_in_words(prediction: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        Columns().batch(prediction, 3, range(3), 0, where="batch 5 of dataloader 1")
    assert "batch 5 of dataloader 1" in str(raised.value)


@pytest.mark.skipif(np.dtype(np.longdouble) == np.float64, reason="no longer than a double on this machine")
@pytest.mark.parametrize("array", [np.ones(3, np.longdouble), np.ones((3, 2), np.longdouble)])
def test_types_that_arrow_lacks_are_named(array: Any) -> None:
    for prediction in (array, list(array), {"prediction": array}):
        with pytest.raises(ValueError, match=r"batch 2 .*'prediction' (is an array of float|has no type of Arrow's)"):
            Columns().batch(prediction, 3, range(3), 0, where="batch 2")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_tensors_are_told_their_way_out() -> None:
    with pytest.raises(ValueError, match=r"quantized tensor. Return `.dequantize\(\)`"):
        written(torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8))


@pytest.mark.parametrize(
    ("columns", "words"),
    [(["x"], "asks for 'x', and there is only 'a', 'b'"), ({"a": "c", "b": "c"}, "one name to several")],
)
def test_columns_that_cannot_be_chosen(columns: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        written({"a": [1] * 3, "b": [2] * 3}, columns=columns)


def test_a_string_is_no_list_of_columns() -> None:
    with pytest.raises(TypeError, match=r"\['logits'\]"):
        Columns("logits")


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (torch.ones(2), torch.ones(2).long(), "'prediction' is of type int64, and was float"),
        (torch.ones(2, 3), torch.ones(2, 4), "Return a list with one tensor per sample"),
        ({"a": [1, 2]}, {"a": ["x", "y"]}, "'a' is of type string, and was int64"),
        ({"a": [1, 2]}, {"a": [1, 2], "b": [1, 2]}, "columns 'index', 'dataloader_idx', 'a', 'b'; those before had"),
        ({"a": [1, 2], "b": [1, 2]}, {"a": [1, 2]}, "None where there is no value"),
        ([1, 2], [0.5, 1.5], "'prediction' is of type double, and was int64"),
        ([0.5, 1.5], [1, 2**60 + 1], "not in range|out of bounds|truncated"),
    ],
)
def test_later_batches_have_the_first_ones_types(first: Any, second: Any, words: str) -> None:
    columns = Columns()
    columns.batch(first, 2, range(2), 0)
    with pytest.raises(ValueError, match=words) as raised:
        columns.batch(second, 2, range(2), 0, where="batch 1")
    assert "batch 1" in str(raised.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([None, None], ["a", "b"]),
        ([None, None], torch.ones(2, 3)),
        ([[], []], [["a"], []]),
        ([{"a": 1, "b": None}] * 2, [{"b": "x", "a": 1}] * 2),
        ([[{"a": None}], []], [[{"a": 1}], None]),
        ([0.5, 1.5], [1, 2]),
        (["a", "b"], None),
        (torch.ones(2, 3), None),
    ],
)
def test_what_had_no_values_gets_a_type_later(first: Any, second: Any) -> None:
    columns = Columns()
    before = columns.batch({"x": first, "y": [1, 2]}, 2, range(2), 0)
    batch = columns.batch({"y": [1, 2], "x": second}, 2, range(2), 0)
    assert batch.schema == columns.schema
    assert before.schema.names == batch.schema.names
    found = batch["x"].to_numpy_ndarray().tolist() if isinstance(second, torch.Tensor) else batch["x"].to_pylist()
    assert found == (second.tolist() if isinstance(second, torch.Tensor) else second or [None, None])


@pytest.mark.parametrize(
    ("batches", "column", "expected"),
    [
        ([[{"a": 1, "c": "x"}, {"a": 2}], [{"a": 3}, {"a": 4}]], "c", ["x", None, None, None]),
        ([[{"a": 1, "c": torch.ones(2)}] * 2, [{"a": 3}, None]], "c", [[1.0, 1.0], [1.0, 1.0], None, None]),
        ([[{"a": 1, "c": 1}] * 2, [{}, {}]], "a", [1, 1, None, None]),
        ([[{"a": 1}, None], [None, None], None, [{"a": 2}, None]], "a", [1, None, None, None, None, None, 2, None]),
        ([{"a": torch.ones(2), "b": {"c": torch.ones(2, 3)}}, None], "a", [1.0, 1.0, None, None]),
        ([[None, None], None, [{"a": 1}, {"a": 2}]], "a", [None] * 4 + [1, 2]),
        ([None, {"a": torch.ones(2), "b": torch.ones(2)}, None], "b", [None, None, 1.0, 1.0, None, None]),
        (
            [[{"r": {"a": 1, "c": 1}}] * 2, [{"r": {"a": 2}}, {}]],
            "r",
            [{"a": 1, "c": 1}] * 2 + [{"a": 2, "c": None}, None],
        ),
        (
            [{"r": [{"a": 1, "c": {"d": "x"}}] * 2}, {"r": [{"a": 2}, None]}],
            "r",
            [{"a": 1, "c": {"d": "x"}}] * 2 + [{"a": 2, "c": None}, None],
        ),
        (
            [{"r": [[{"a": 1, "c": 1}], []]}, {"r": [[{"a": 2}, {"a": 3}], None]}],
            "r",
            [[{"a": 1, "c": 1}], [], [{"a": 2, "c": None}, {"a": 3, "c": None}], None],
        ),
        ([{"s": [Pair(1, "x"), None]}, {"s": [None, None]}], "s", [{"score": 1, "label": "x"}, None, None, None]),
    ],
)
def test_what_a_sample_lacks_is_null(batches: list[Any], column: str, expected: list[Any]) -> None:
    columns = Columns()
    made = [columns.batch(batch, 2, range(2), 0) for batch in batches]
    tables = [pa.Table.from_batches([batch]) for batch in made]
    schema = united(batch.schema for batch in made)
    assert schema is not None
    assert schema == columns.schema
    assert "prediction" not in schema.names
    found = [
        value for each in tables for value in (each[column].to_pylist() if column in each.column_names else [None] * 2)
    ]
    assert found == expected


def test_what_is_chosen_may_be_lacking_too() -> None:
    columns = Columns({"a": "x", "c": "y"})
    assert columns.batch(None, 2, range(2), 0)["y"].to_pylist() == [None, None]
    assert columns.batch([{"a": 1, "c": 2}, {"a": 3}], 2, range(2), 0)["y"].to_pylist() == [2, None]
    assert columns.batch([{"a": 1}, {}], 2, range(2), 0)["y"].to_pylist() == [None, None]
    with pytest.raises(ValueError, match="asks for 'c', and there is only 'a'"):
        columns.batch({"a": [1, 2]}, 2, range(2), 0)
    with pytest.raises(ValueError, match="asks for 'typo', and there is only 'a'"):
        Columns(["typo"]).batch([{"a": 1}, {}], 2, range(2), 0)


def test_a_key_that_comes_later_is_an_error() -> None:
    columns = Columns()
    columns.batch([{"a": 1}, {"a": 1}], 2, range(2), 0)
    with pytest.raises(ValueError, match=r"columns 'index', 'dataloader_idx', 'a', 'b'; those before had"):
        columns.batch([{"a": 1, "b": 1}, {}], 2, range(2), 0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"id": [1]}, {"id": ["x"]}),
        ({"id": [1]}, {"id": [2], "b": [2]}),
        ({"a": None}, {"b": [1]}),
        ({"prediction": None, "a": [1]}, {"a": [1]}),
    ],
)
def test_only_after_none_alone_are_there_other_columns(first: Any, second: Any) -> None:
    columns = Columns()
    columns.batch(first, 1, [0], 0)
    with pytest.raises(ValueError, match=r"They have the columns|is of type"):
        columns.batch(second, 1, [1], 0)


def test_the_id_keeps_its_type_when_columns_come() -> None:
    columns = Columns()
    columns.batch(None, 1, [0], 0, ids=["x"])
    with pytest.raises(ValueError, match="'id' is of type int64, and was string"):
        columns.batch({"a": [1]}, 1, [1], 0, ids=[1])
    with pytest.raises(ValueError, match="those before had 'index', 'dataloader_idx', 'id'"):
        columns.batch({"a": [1]}, 1, [1], 0)
    assert columns.batch({"a": [1]}, 1, [1], 0, ids=["y"]).schema.names == ["index", "dataloader_idx", "id", "a"]


def test_an_id_is_not_left_out() -> None:
    columns = Columns()
    columns.batch([{"a": 1}], 1, [0], 0, ids=["x"])
    with pytest.raises(ValueError, match="those before had 'index', 'dataloader_idx', 'id', 'a'"):
        columns.batch([{"a": 1}], 1, [1], 0)


def test_an_earlier_runs_schema_holds() -> None:
    schema = written(torch.ones(3)).schema
    with pytest.raises(ValueError, match="was float"):
        written(torch.ones(3).long(), schema=schema)
