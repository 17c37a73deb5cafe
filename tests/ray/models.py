"""What actors load in these tests."""

import os
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers import Net


class Columns(nn.Module):
    """Predicts from the column `x`, and says on what."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net().net

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.net(batch["x"])
        return {"prediction": found, "hpu": torch.full((len(found),), found.device.type == "hpu")}


class Types(nn.Module):
    """Says what it gets of each column."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = len(batch["id"])
        kinds = [f"{name} {type(values).__name__}" for name, values in batch.items()]
        return {"kinds": [", ".join(kinds)] * rows, "even": torch.stack([batch["id"] % 2 == 0] * 2, 1)}


class Loading:
    """A factory that leaves a file in a folder for each call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> nn.Module:
        (self.folder / uuid.uuid4().hex).touch()
        return Columns()


class Dying:
    """Ends its process at a row, once: a file says whether it has."""

    def __init__(self, row: int, mark: Path) -> None:
        self.row, self.mark = row, mark

    def __call__(self, table: Any) -> dict[str, Tensor]:
        if self.row in table["id"] and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return numbers(table)


class Failing:
    """Refuses a row while a file is there, and counts the rows that it lets pass in a folder."""

    def __init__(self, row: int, mark: Path, counts: Path) -> None:
        self.row, self.mark, self.counts = row, mark, counts

    def __call__(self, table: Any) -> dict[str, Tensor]:
        if self.mark.exists() and self.row in table["id"]:
            raise ValueError(f"row {self.row} is bad")
        (self.counts / f"{len(table['id'])}-{uuid.uuid4().hex}").touch()
        return numbers(table)


class Waiting(Failing):
    """Waits at that row while the file is there."""

    def __call__(self, table: Any) -> dict[str, Tensor]:
        while self.mark.exists() and self.row in table["id"]:
            time.sleep(0.05)
        return super().__call__(table)


def numbers(table: Any) -> dict[str, Tensor]:
    return {"x": torch.from_numpy(np.stack(list(table["x"])))}


def only_ids(table: Any) -> dict[str, Tensor]:
    return {"id": torch.from_numpy(np.array(table["id"]))}
