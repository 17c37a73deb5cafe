"""Where cases are listed, with what is expected of their graphs, and what several kinds of them use."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.helpers import Net, Rows, rows
from tests.parity.recorder import Case


@dataclass(frozen=True)
class Entry:
    """One case, and what it does in HPU lazy mode with default flags, in a process that traced nothing before."""

    make: Callable[[], Case]
    captures: int
    """Graphs that it captures: one per traced graph and shape. With a `before`, those of the run after it."""
    replays: int
    """Replays beside them."""
    warns: tuple[str, ...]
    """Regular expressions, each found in one warning. These, and no others, are given beside those of stock."""


CASES: dict[str, Entry] = {}


def case(*, captures: int, replays: int, warns: tuple[str, ...] = ()) -> Callable[[Callable[[], Case]], Entry]:
    """Put a function that makes fresh objects into the list of cases, under its name."""

    def add(make: Callable[[], Case]) -> Entry:
        assert make.__name__ not in CASES, f"There are two cases with the name {make.__name__}."
        CASES[make.__name__] = Entry(make, captures, replays, warns)
        return CASES[make.__name__]

    return add


class Stepped(Net):
    """A module whose step is a function of module, batch and index."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.step = step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(self, batch, batch_idx)


class Items(Dataset[Any]):
    def __init__(self, make: Callable[[Tensor, int], Any], length: int = 9) -> None:
        self.make, self.rows = make, Rows(length).rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.rows[index], index)


def items(make: Callable[[Tensor, int], Any], length: int = 9, **options: Any) -> DataLoader[Any]:
    return DataLoader(Items(make, length), **({"batch_size": 2} | options))


class Data(LightningDataModule):
    def predict_dataloader(self) -> Any:
        return [rows(6, 2), rows(3, 2)]


class NamedScores(NamedTuple):
    scores: Tensor
    number: int


class Transfers(Net):
    """Overrides every transfer hook and notes the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def _see(self, name: str) -> None:
        self.seen[name] = self.seen.get(name, 0) + 1

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self._see(f"before {dataloader_idx}")
        return batch + 1

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self._see(f"transfer {dataloader_idx}")
        return super().transfer_batch_to_device(batch * 2, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self._see(f"after {dataloader_idx}")
        return batch - 3
