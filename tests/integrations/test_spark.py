"""The functions for Spark, called as Spark calls them; with Spark itself in `tests/spark/`."""

import pickle
from collections.abc import Iterator
from inspect import signature
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer import InferenceConfig
from lightning_hpu_infer.integrations import spark
from lightning_hpu_infer.integrations.spark import arrow_predictor, predict_function
from tests.helpers import Net, Rows

loads = 0


class Columns(nn.Module):
    """Predicts from the column `x`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net().net

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["x"])


def factory() -> nn.Module:
    global loads
    loads += 1
    return Columns()


def network() -> nn.Module:
    return Net().net


@pytest.fixture(autouse=True)
def fresh(device: str) -> Iterator[None]:
    """Ends the pipeline that a worker would keep."""
    global loads
    loads = 0
    yield
    if spark._loaded is not None:
        spark._loaded[1].close()
        spark._loaded = None


def record_batches(length: int, rows: int = 5) -> Iterator[pa.RecordBatch]:
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        vectors = pa.FixedShapeTensorArray.from_numpy_ndarray(Rows(length).rows[start:stop].numpy())
        yield pa.RecordBatch.from_arrays([pa.array(range(start, stop)), vectors], names=["id", "x"])


def expected(length: int) -> Tensor:
    with torch.inference_mode():
        return Net().net(Rows(length).rows)


@pytest.mark.parametrize("batch_size", [2, 5, None])
@pytest.mark.parametrize("config", [None, InferenceConfig(prefetch=3, in_flight=2)], ids=["default", "deep"])
def test_partitions_come_back_with_predictions_and_share_a_model(
    batch_size: int | None, config: InferenceConfig | None
) -> None:
    function = arrow_predictor(factory, batch_size=batch_size, columns=["id"], config=config)
    for length in (12, 3, 0):
        sent = pickle.loads(pickle.dumps(function))  # to a worker, for each task
        found = list(sent(record_batches(length)))
        assert [row for batch in found for row in batch.column("id").to_pylist()] == list(range(length))
        predictions = [row for batch in found for row in batch.column("prediction").to_pylist()]
        assert all(batch.schema.field("prediction").type == pa.list_(pa.float32()) for batch in found)
        torch.testing.assert_close(torch.tensor(predictions).reshape(length, 3), expected(length))
    assert loads == 1
    list(arrow_predictor(factory)(record_batches(2)))
    assert loads == 2


def test_a_function_of_arrays() -> None:
    predict = pickle.loads(pickle.dumps(predict_function(network, batch_size=4)))()
    assert len(signature(predict).parameters) == 1
    found = predict(Rows(11).rows.numpy())
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), expected(11))


def first_two(a: Any, b: Any) -> Any:
    return torch.from_numpy(np.stack([a, b, a, b], 1))


def test_a_function_of_several_columns_and_outputs() -> None:
    config = InferenceConfig(postprocess=lambda output: {"score": output[:, 0], "all": output.bfloat16()})
    predict = predict_function(network, batch_size=4, preprocess=first_two, config=config)()
    assert list(signature(predict).parameters) == ["a", "b"]  # by which Spark knows how to call it
    columns = Rows(9, 2).rows.numpy()
    found = predict(columns[:, 0], columns[:, 1])
    with torch.inference_mode():
        whole = Net().net(first_two(columns[:, 0], columns[:, 1]))
    torch.testing.assert_close(torch.from_numpy(found["score"]), whole[:, 0])
    torch.testing.assert_close(torch.from_numpy(found["all"]), whole.bfloat16().float())


def doubles() -> nn.Module:
    return Times(2)


def triples() -> nn.Module:
    return Times(3)


class Times(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_functions_of_several_models_live_in_one_worker() -> None:
    # Spark keeps what it has loaded for as long as a worker lives.
    twice, thrice = predict_function(doubles, batch_size=4)(), predict_function(triples, batch_size=4)()
    arrow = arrow_predictor(factory, columns=["id"])
    for _ in range(2):
        assert twice(np.arange(6.0)).tolist() == [0, 2, 4, 6, 8, 10]
        assert thrice(np.arange(6.0)).tolist() == [0, 3, 6, 9, 12, 15]
        assert len(list(arrow(record_batches(3)))) == 1


@pytest.mark.parametrize("rows", [1, 4, 6])
@pytest.mark.parametrize("made", ["total", "flat", "named", "list"])
def test_a_function_of_arrays_refuses_predictions_that_are_not_one_per_row(rows: int, made: str) -> None:
    made_of: dict[str, Any] = {
        "total": lambda output: output.sum(0, keepdim=True).repeat(3, 1),
        "flat": lambda output: output.reshape(-1),
        "named": lambda output: {"good": output, "bad": output.reshape(-1)},
        "list": lambda output: [1.0] * (len(output) + 1),
    }
    config = InferenceConfig(postprocess=made_of[made])
    predict = predict_function(network, batch_size=4, config=config)()
    with pytest.raises(ValueError, match="has not one entry for each of"):
        predict(Rows(rows).rows.numpy())


def test_a_function_of_arrays_gives_no_rows_for_none() -> None:
    found = predict_function(network, batch_size=4)()(np.zeros((0, 4), np.float32))
    assert (found.shape, found.dtype) == ((0, 3), np.float32)
    config = InferenceConfig(postprocess=lambda output: {"score": output[:, 0]})
    named = predict_function(network, batch_size=4, config=config)()(np.zeros((0, 4), np.float32))
    assert {name: values.shape for name, values in named.items()} == {"score": (0,)}


def test_batch_sizes_are_checked_where_they_are_given() -> None:
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, or None, got 0"):
        arrow_predictor(factory, batch_size=0)
    with pytest.raises(ValueError, match="`columns` must be a list of names, got 'id'"):
        arrow_predictor(factory, columns="id")
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, got 0"):
        predict_function(factory, batch_size=0)
