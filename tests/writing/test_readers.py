"""The plain files open in what people read Parquet with, while a run is under way too."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import duckdb
import pandas
import polars
import pyarrow.dataset
import pytest
import torch

from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.read import read_predictions
from tests.writing.runs import opened


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two ranks' files with all kinds of columns, and temporary ones of a run that goes on."""
    path = tmp_path_factory.mktemp("predictions")
    under_way = []
    for rank in range(2):
        run = opened(path, rank, 2)
        shards, columns = run.shards(), Columns()
        for start in range(rank * 2, 8, 4):
            index = [start, start + 1]
            prediction = {
                "half": torch.tensor(index).half(),
                "brain": torch.tensor(index).bfloat16(),
                "unsigned": torch.tensor(index).to(torch.uint64),
                "truth": torch.tensor(index) > 2,
                "vector": torch.tensor(index)[:, None].expand(2, 3).float(),
                "matrix": torch.tensor(index)[:, None, None].expand(2, 2, 2).half(),
                "ragged": [torch.ones(i) for i in index],
                "words": [["a"] * i for i in index],
                "text": [None if i == 1 else str(i) for i in index],
                "pair": {"x": torch.tensor(index), "y": ["y"] * 2},
                "boxes": [[{"label": "cat", "box": torch.ones(4)}] * i for i in index],
            }
            shards.write(columns.batch(prediction, 2, index, 0))
            shards.commit()
        shards.write(columns.batch(prediction, 2, index, 0))
        under_way.append(shards)
        run.release()
    assert len(list(path.rglob(".part-*.tmp"))) == 2
    yield path
    for shards in under_way:
        shards.abort()


INDICES = list(range(8))
TEXT = ["0", None, *map(str, range(2, 8))]


def test_pandas(path: Path) -> None:
    """Of the folder itself, whose manifests and temporary files it passes over."""
    frame = pandas.read_parquet(path).sort_values("index")
    assert frame["index"].tolist() == INDICES
    assert [text if isinstance(text, str) else None for text in frame["text"]] == TEXT
    assert [list(vector) for vector in frame["vector"]] == [[i] * 3 for i in INDICES]
    assert frame["half"].tolist() == INDICES


def test_arrows_datasets(path: Path) -> None:
    table = pyarrow.dataset.dataset(path).to_table().sort_by("index")
    assert table["index"].to_pylist() == INDICES
    assert table["matrix"].to_pylist() == [[i] * 4 for i in INDICES]


def test_polars(path: Path) -> None:
    frame = polars.read_parquet(path / "**" / "*.parquet").sort("index")
    assert frame["index"].to_list() == INDICES
    assert frame["text"].to_list() == TEXT
    assert frame["half"].to_list() == INDICES
    assert [list(vector) for vector in frame["vector"].to_list()] == [[i] * 3 for i in INDICES]
    assert [len(boxes) for boxes in frame["boxes"].to_list()] == INDICES
    assert frame["pair"].to_list()[3] == {"x": 3, "y": "y"}


def test_duckdb(path: Path) -> None:
    files = f"read_parquet('{path}/**/*.parquet')"
    found = duckdb.sql(f"select index, text, vector, half, len(ragged), pair.x from {files} order by index")
    assert found is not None
    rows = found.fetchall()
    assert [row[0] for row in rows] == INDICES
    assert [row[1] for row in rows] == TEXT
    assert [list(row[2]) for row in rows] == [[i] * 3 for i in INDICES]
    assert [row[3:] for row in rows] == [(i, i, i) for i in INDICES]


@pytest.mark.parametrize("first", [[{"a": 0, "p": None}] * 2, [{"a": 0}] * 2], ids=["no value", "no column"])
def test_columns_that_have_values_in_some_files_only(tmp_path: Path, first: Any) -> None:
    """As docs/predictions.md says to read them."""
    for rank, prediction in enumerate([first, [{"a": 1, "p": "x"}, {"a": 1, "p": "y"}]]):
        run = opened(tmp_path, rank, 2)
        shards = run.shards()
        shards.write(Columns().batch(prediction, 2, [2 * rank, 2 * rank + 1], 0))
        shards.close(complete=True)
        run.release()
    files = sorted(map(str, tmp_path.glob("**/*.parquet")))
    expected = [None, None, "x", "y"]
    assert read_predictions(tmp_path)["p"].to_pylist() == expected
    frame = pandas.concat(map(pandas.read_parquet, files))
    assert [text if isinstance(text, str) else None for text in frame["p"]] == expected
    assert polars.concat(map(polars.read_parquet, files), how="diagonal_relaxed")["p"].to_list() == expected
    found = duckdb.sql(f"select p from read_parquet('{tmp_path}/**/*.parquet', union_by_name = true) order by index")
    assert found is not None
    assert [row[0] for row in found.fetchall()] == expected


@pytest.mark.full
@pytest.mark.skipif(find_spec("datasets") is None, reason="no dependency, as it is large: pip install datasets")
def test_huggingface_datasets(path: Path, tmp_path: Path) -> None:
    """In a process of its own, as it sets environment variables."""
    code = f"""
import datasets
loaded = datasets.load_dataset("parquet", data_files={str(path / "**" / "*.parquet")!r}, cache_dir={str(tmp_path)!r})
rows = sorted(loaded["train"], key=lambda row: row["index"])
assert [row["index"] for row in rows] == {INDICES}
assert [row["vector"] for row in rows] == [[i] * 3 for i in {INDICES}]
assert [row["text"] for row in rows] == {TEXT}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
