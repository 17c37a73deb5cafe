"""DataFrames of Spark, predicted in the Python workers of a real Spark on this machine."""

import os
import subprocess
import sys
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer.integrations.spark import arrow_predictor, predict_function
from tests.helpers import Net, Rows

# Spark 4.3 warns of pandas 3, and of more that it does itself.
pytestmark = pytest.mark.filterwarnings("default")

ROWS = 103
ROOT = Path(__file__).parents[2]


class Columns(nn.Module):
    """Predicts from the column `x`, and says on what."""

    def __init__(self, loads: Path | None = None) -> None:
        super().__init__()
        self.net = Net().net
        if loads is not None:
            (loads / f"{os.getpid()}-{uuid.uuid4().hex}").touch()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.net(batch["x"])
        return {"prediction": found, "hpu": torch.full((len(found),), found.device.type == "hpu")}


def network() -> nn.Module:
    return Net().net


def stacked(a: Any, b: Any, c: Any, d: Any) -> Tensor:
    return torch.from_numpy(np.stack([a, b, c, d], 1))


def dying(mark: Path, batch: Any) -> dict[str, Tensor]:
    """Ends the worker at row 70, once."""
    if 70 in batch.column("id").to_pylist() and not mark.exists():
        mark.touch()
        os._exit(1)
    return vectors(batch)


def vectors(batch: Any) -> dict[str, Tensor]:
    return {"x": torch.tensor(batch.column("x").to_pylist())}


@pytest.fixture
def frame(session: Any) -> Any:
    rows = [(number, row) for number, row in enumerate(Rows(ROWS).rows.tolist())]
    return session.createDataFrame(rows, "id long, x array<float>").repartitionByRange(4, "id")


def check(rows: list[Any]) -> None:
    assert sorted(row["id"] for row in rows) == list(range(ROWS))
    with torch.inference_mode():
        expected = Net().net(Rows(ROWS).rows)[[row["id"] for row in rows]]
    torch.testing.assert_close(torch.tensor([row["prediction"] for row in rows]), expected)


def test_map_in_arrow_predicts_each_row_once_and_loads_once_per_worker(frame: Any, tmp_path: Path) -> None:
    predict = arrow_predictor(partial(Columns, tmp_path), batch_size=4, columns=["id"], preprocess=vectors)
    rows = frame.mapInArrow(predict, "id long, prediction array<float>, hpu boolean").collect()
    check(rows)
    assert {row["hpu"] for row in rows} == {True}
    workers = [path.name.partition("-")[0] for path in tmp_path.iterdir()]
    assert len(workers) == len(set(workers))
    assert 1 <= len(workers) <= 2


def test_a_worker_that_dies_is_replaced_and_each_row_is_written_once(frame: Any, tmp_path: Path) -> None:
    predict = arrow_predictor(Columns, batch_size=4, columns=["id"], preprocess=partial(dying, tmp_path / "died"))
    predicted = frame.mapInArrow(predict, "id long, prediction array<float>, hpu boolean")
    predicted.write.parquet(str(tmp_path / "out"))
    assert (tmp_path / "died").exists()
    check(pyarrow.parquet.read_table(tmp_path / "out").to_pylist())


def test_predict_batch_udf(frame: Any) -> None:
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql.types import ArrayType, FloatType

    score = predict_batch_udf(
        predict_function(network, batch_size=4),
        return_type=ArrayType(FloatType()),
        batch_size=12,
        input_tensor_shapes=[[4]],
    )
    check(frame.withColumn("prediction", score("x")).collect())
    # A worker has one model: the other takes its place, and gives it back.
    other = predict_batch_udf(
        predict_function(network, batch_size=3),
        return_type=ArrayType(FloatType()),
        batch_size=12,
        input_tensor_shapes=[[4]],
    )
    for each in (other, score):
        check(frame.withColumn("prediction", each("x")).collect())

    parts = frame.selectExpr("id", "x[0] a", "x[1] b", "x[2] c", "x[3] d")
    score = predict_batch_udf(
        predict_function(network, batch_size=4, preprocess=stacked), return_type=ArrayType(FloatType()), batch_size=12
    )
    check(parts.withColumn("prediction", score("a", "b", "c", "d")).collect())


@pytest.mark.timeout(300)
def test_the_example_gives_the_embeddings_of_stock_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    from examples.compare import trainer_of
    from examples.embed_sentences import SentenceEmbedder, embed, loader_of

    command = [
        sys.executable,
        "-m",
        "examples.spark_predict",
        "--limit",
        "40",
        "--batch-size",
        "16",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    table = pyarrow.parquet.read_table(tmp_path / "out")
    expected = embed(trainer_of("cpu"), SentenceEmbedder(), loader_of(table["text"].to_pylist(), 16, 48))
    found = torch.from_numpy(np.stack(table["embedding"].to_numpy()))
    assert len(found) == 40
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
