"""What a process that is killed does: predict numbers into a folder, and tell of every batch."""

import logging
import os
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter, emulator

COUNT = 400


class Numbers(Dataset[Tensor]):
    """Sample `i` is made of `i`."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> Tensor:
        return torch.full((4,), float(i))


class Scores(LightningModule):
    """Integer weights, so that a score does not depend on its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.net.weight.data = torch.arange(8.0).view(2, 4)
        self.net.bias.data = torch.tensor([1.0, 2.0])

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch)


class Tells(Callback):
    """Tells the parent of each batch's start."""

    def __init__(self, told: Connection) -> None:
        self._told = told

    def on_predict_batch_start(self, *_: Any) -> None:
        self._told.send(None)


def length_of(sample: Tensor) -> int:
    """Some length, for batches in order of length."""
    return int(sample[0]) % 17


def predict(path: Path, told: Connection, size: int, on_hpu: bool, flags: dict[str, Any]) -> None:
    """Predict all that is not there yet, committing every few batches; `told` is closed at the end."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if on_hpu:
        emulator.install()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    writer = PredictionWriter(path, rows_per_file=20)
    trainer = Trainer(
        accelerator=HPUInferenceAccelerator(**flags),
        callbacks=[writer, Tells(told)],
        enable_progress_bar=False,
        **options,
    )
    trainer.predict(Scores(), DataLoader(Numbers(), size), return_predictions=False)
    told.close()
    os._exit(0)  # what else there is to end belongs to the server that this was forked from
