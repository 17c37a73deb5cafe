"""Runs that write predictions, as the tests of this folder need them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow import parquet

from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.manifest import Manifest
from lightning_hpu_infer.writing.opening import Opened, open_path
from lightning_hpu_infer.writing.read import read_predictions
from lightning_hpu_infer.writing.shards import Shards
from lightning_hpu_infer.writing.storage import LocalStorage


def value_of(index: int) -> float:
    """What the model of these tests predicts for a sample."""
    return index * 0.5


def predictions(indices: Sequence[int]) -> dict[str, Any]:
    """Those of a batch."""
    return {
        "value": torch.tensor([value_of(index) for index in indices]),
        "vector": torch.tensor([[index, index + 1] for index in indices]),
        "text": [f"sample {index}" for index in indices],
    }


def write_batches(shards: Shards, columns: Columns, batches: Sequence[Sequence[int]], dataloader_idx: int = 0) -> None:
    """Write these samples."""
    for number, batch in enumerate(batches):
        made = columns.batch(predictions(batch), len(batch), batch, dataloader_idx, where=f"batch {number}")
        shards.write(made)


def batches_of(indices: Sequence[int], size: int = 4) -> list[list[int]]:
    """Cut into batches."""
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


def opened(path: Path | str, rank: int = 0, world: int = 1, **options: Any) -> Opened:
    """The path, opened for a run of these tests."""
    return open_path(path, rank, world, **({"fingerprint": {"model": "a"}} | options))


def run(
    path: Path | str, indices: Sequence[int], rank: int = 0, world: int = 1, *, complete: bool = True, **options: Any
) -> None:
    """Predict these samples that are not done yet, four at a time, into files of eight."""
    opening = {name: options.pop(name) for name in ("fingerprint", "resume", "overwrite") if name in options}
    each = opened(path, rank, world, **opening)
    try:
        left = [index for index in indices if index not in set(each.done.get(0, np.array([])).tolist())]
        shards = each.shards(**({"rows_per_file": 8} | options))
        write_batches(shards, Columns(schema=each.schema), batches_of(left))
        shards.close(complete=complete)
    finally:
        each.release()


def read_again(path: Path, batches: Sequence[Any], rows: int) -> Any:
    """Write these batches, and read them."""
    shards = Shards(LocalStorage(path), Manifest(rank=0, world=1, fingerprint={}))
    columns = Columns()
    for number, batch in enumerate(batches):
        shards.write(columns.batch(batch, rows, range(number * rows, (number + 1) * rows), 0))
    shards.close(complete=True)
    return read_predictions(path)


def in_files(path: Path) -> list[int]:
    """The samples in all Parquet files, as anybody finds them."""
    tables = [parquet.read_table(file) for file in sorted(path.glob("**/*.parquet"))]
    return sorted(index for table in tables for index in table["index"].to_pylist())


def names(path: Path) -> list[str]:
    """All files but locks."""
    files = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in files if not name.startswith(".locks"))
