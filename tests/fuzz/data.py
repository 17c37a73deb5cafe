"""The batches that programs predict: containers, dtypes, and who owns their memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.fuzz.listeners import Fault


class Named(NamedTuple):
    x: Any
    ids: Any


@dataclass
class Fields:
    x: Any
    ids: Any


def contained(kind: str, x: Tensor, ids: Tensor) -> Any:
    """Rows and their numbers as a batch of some kind."""
    if kind == "numpy":
        return {"x": x.numpy(), "ids": ids.numpy()}
    return {
        "tensor": lambda: x,
        "tuple": lambda: (x, ids),
        "list": lambda: [ids, x],
        "dict": lambda: {"ids": ids, "x": x},
        "named": lambda: Named(x, ids),
        "dataclass": lambda: Fields(x, ids),
        "text": lambda: {"x": x, "names": [f"row {i}" for i in ids.flatten().tolist()]},
    }[kind]()


def content(batch: Any, device: torch.device) -> Tensor:
    """The rows of a batch of any kind, as floats on a device."""
    if isinstance(batch, dict):
        batch = batch["x"]
    elif isinstance(batch, list):
        batch = next(each for each in batch if each.ndim == 2)
    elif isinstance(batch, Named | Fields):
        batch = batch.x
    elif isinstance(batch, tuple):
        batch = batch[0]
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(batch).to(device)
    return batch.float()


class Source:
    """The rows of one loader, and how they become batches."""

    def __init__(self, choices: Any, fault: Fault, rows: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        scaled = torch.randn(rows, 4, generator=generator) * 3
        dtype = getattr(torch, choices.dtype)
        self.x = scaled.abs().to(dtype) if choices.dtype == "uint8" else scaled.to(dtype)
        self.ids = torch.arange(rows)
        self.kind, self.size, self.fault = choices.container, choices.batch_size, fault
        self.faulty, self.augments = fault.stage, choices.augments

    def pass_by(self, stage: str) -> None:
        if stage == self.faulty:
            self.fault.pass_by(stage)

    def collated(self, samples: list[tuple[Tensor, Tensor]]) -> Any:
        self.pass_by("collate")
        x, ids = zip(*samples, strict=True)
        return contained(self.kind, torch.stack(x), torch.stack(ids))

    def row(self, index: int) -> Tensor:
        x = self.x[index]
        return x + torch.randint(0, 3, x.shape).to(x.dtype) if self.augments else x

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.x), self.size):
            self.pass_by("dataset")
            yield self.x[start : start + self.size].clone(), self.ids[start : start + self.size].clone()


class Samples(Dataset[Any]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.source.pass_by("dataset")
        return self.source.row(index), self.source.ids[index]


class SampleStream(IterableDataset[Any]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        samples = Samples(self.source)
        return (samples[index] for index in range(len(samples)))


class Unsized:
    """Makes each batch when it is asked for, and does not say how many."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        for x, ids in self.source.batches():
            self.source.pass_by("collate")
            yield contained(self.source.kind, x, ids)


class Stored(Sequence[Any]):
    """Batches that exist, one after the other. In a list, Lightning takes each for a loader."""

    def __init__(self, source: Source) -> None:
        self.batches = list(Unsized(source))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]


class Reused(Unsized):
    """Fills the same memory for every batch."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.x, self.ids = torch.zeros_like(source.x[: source.size]), torch.zeros_like(source.ids[: source.size])

    def __len__(self) -> int:
        return -(-len(self.source.x) // self.source.size)

    def __iter__(self) -> Iterator[Any]:
        for x, ids in self.source.batches():
            self.source.pass_by("collate")
            yield contained(self.source.kind, self.x[: len(x)].copy_(x), self.ids[: len(x)].copy_(ids))


class SameItem(Dataset[Any]):
    """Gives batches as items, all in the same memory, as readers of large files do."""

    def __init__(self, source: Source) -> None:
        self.source, self.reused = source, Reused(source)

    def __len__(self) -> int:
        return len(self.reused)

    def __getitem__(self, index: int) -> Any:
        self.source.pass_by("dataset")
        part = slice(index * self.source.size, (index + 1) * self.source.size)
        x, ids = self.source.x[part], self.source.ids[part]
        return contained(self.source.kind, self.reused.x[: len(x)].copy_(x), self.reused.ids[: len(x)].copy_(ids))


def _loader(choices: Any, fault: Fault, rows: int) -> Any:
    source = Source(choices, fault, rows)

    def only(items: list[Any]) -> Any:
        source.pass_by("collate")
        return items[0]

    return {
        "dataset": lambda: DataLoader(
            Samples(source), choices.batch_size, collate_fn=source.collated, num_workers=choices.workers
        ),
        "iterable": lambda: DataLoader(SampleStream(source), choices.batch_size, collate_fn=source.collated),
        "batches": lambda: DataLoader(Stored(source), batch_size=None),  # type: ignore[arg-type]
        "stored": lambda: Stored(source),
        "unsized": lambda: Unsized(source),
        "reused": lambda: Reused(source),
        "same_item": lambda: DataLoader(SameItem(source), 1, collate_fn=only),
    }[choices.source]()


class Data(LightningDataModule):
    """Loaders, and a hook that a datamodule may have in place of the module."""

    def __init__(self, loaders: Any) -> None:
        super().__init__()
        self.loaders = loaders

    def predict_dataloader(self) -> Any:
        return self.loaders

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": content(batch, cast(Any, self.trainer).strategy.root_device) * (dataloader_idx + 2)}


def make_loaders(choices: Any, fault: Fault, more: int = 0) -> dict[str, Any]:
    """Fresh loaders of a program, as arguments of `predict`.

    Args:
        choices: The program.
        fault: Raises in a dataset or when a batch is collated.
        more: How many rows more than the program says.
    """
    loaders = [_loader(choices, fault, max(2, choices.rows + more - 3 * index)) for index in range(choices.loaders)]
    given = loaders if choices.loaders > 1 else loaders[0]
    return {"datamodule": Data(given)} if choices.datamodule else {"dataloaders": given}
