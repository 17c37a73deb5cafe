"""Runs of a Trainer with a `PredictionWriter`, and what they have to write."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter
from lightning_hpu_infer.writing.read import read_predictions
from tests.helpers import trainer

COUNT = 23


class Numbers(Dataset[dict[str, Any]]):
    """Samples of various lengths that note who was loaded."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        self.loaded.append(i)
        return {"row": torch.full((4,), float(i)), "name": f"sample {i}"}


class Stream(IterableDataset[dict[str, Any]]):
    def __init__(self, count: int = COUNT) -> None:
        self.count = count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(Numbers().__getitem__, range(self.count))


class Scores(LightningModule):
    """Ends a run by an error before one of its batches."""

    def __init__(self, fails_at: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        for number, weight in enumerate(self.parameters()):  # exact in whatever order it is summed up
            weight.data = torch.arange(weight.numel()).view(weight.shape) % 5 - 2.0 + number + seed
        self.fails_at = fails_at
        self.seen: list[int] = []

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.fails_at == len(self.seen):
            raise RuntimeError("killed")
        self.seen.append(batch_idx)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"scores": self.net(batch["row"]), "row": batch["row"][:, 0]}


def predict(path: Path, module: LightningModule, loaders: Any, *, writer: Any = None, **flags: Any) -> Any:
    ours = trainer(HPUInferenceAccelerator(**flags), [writer or PredictionWriter(path)])
    return ours.predict(module, loaders)


def stop(path: Path, loaders: Any, after: int, **flags: Any) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        predict(path, Scores(after), loaders, **flags)


def expected(loaders: Any) -> list[tuple[int, int, float, list[float]]]:
    """Rows that stock Lightning predicts: dataloader, index, first number, scores."""
    found: Any = trainer("cpu").predict(Scores(), loaders)
    lists = found if isinstance(loaders, list) else [found]
    return [
        (loader, index, row, scores)
        for loader, batches in enumerate(lists)
        for index, (row, scores) in enumerate(
            pair for batch in batches for pair in zip(batch["row"].tolist(), batch["scores"].tolist(), strict=True)
        )
    ]


def written(path: Path) -> list[tuple[int, int, float, list[float]]]:
    table = read_predictions(path)
    scores = table["scores"].combine_chunks().to_numpy_ndarray().tolist()
    columns = (table["dataloader_idx"].to_pylist(), table["index"].to_pylist(), table["row"].to_pylist(), scores)
    return list(zip(*columns, strict=True))
