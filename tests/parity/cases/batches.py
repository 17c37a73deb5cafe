"""Batches of every kind, and hooks on their way to the device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding

from tests.helpers import Net, rows
from tests.parity.cases.registry import Data, NamedScores, Stepped, Transfers, case, items
from tests.parity.recorder import Case


@case(captures=1, replays=2)
def batches_with_strings_and_ids() -> Case:
    loader = items(lambda x, i: {"x": x, "id": f"row {i}", "number": i})
    return Case(Stepped(lambda m, b, i: (m.net(b["x"]), b["id"], b["number"])), loader)


@case(captures=1, replays=2)
def batches_of_tuples() -> Case:
    return Case(Stepped(lambda m, b, i: m.net(b[0]) + b[1][:, None]), items(lambda x, i: (x, i)))


@case(captures=1, replays=2)
def batches_of_named_tuples() -> Case:
    return Case(Stepped(lambda m, b, i: (m.net(b.scores), b.number)), items(NamedScores))


def encode(rows: list[Tensor]) -> BatchEncoding:
    return BatchEncoding({"x": torch.stack(rows), "mask": torch.ones(len(rows), dtype=torch.int64)})


@case(captures=1, replays=2)
def batches_of_batch_encodings() -> Case:
    loader = items(lambda x, i: x, collate_fn=encode)
    return Case(Stepped(lambda m, b, i: m.net(b["x"]) * b["mask"][:, None]), loader)


@dataclass
class Record:
    x: Tensor
    names: list[str]


def collect(rows: list[tuple[Tensor, int]]) -> Record:
    return Record(torch.stack([x for x, _ in rows]), [f"row {i}" for _, i in rows])


@case(captures=1, replays=2)
def batches_of_dataclasses() -> Case:
    loader = items(lambda x, i: (x, i), collate_fn=collect)
    return Case(Stepped(lambda m, b, i: (m.net(b.x), b.names)), loader)


class Bag:
    """A batch object of the user's own, as those of graph libraries are."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.moves = 0

    def to(self, device: Any) -> "Bag":
        moved = Bag(self.x.to(device))
        moved.moves = self.moves + 1
        return moved


@case(captures=2, replays=2)
def batches_of_own_objects() -> Case:
    loader = items(lambda x, i: x, collate_fn=lambda rows: Bag(torch.stack(rows)))
    return Case(Stepped(lambda m, b, i: (m.net(b.x), b.moves)), loader)


@case(captures=0, replays=0)
def lists_without_tensors() -> Case:
    loader = items(lambda x, i: i, collate_fn=list)
    return Case(Stepped(lambda m, b, i: [number * 2 for number in b]), loader)


# Transfer hooks


@case(captures=1, replays=3)
def transfer_hooks_of_the_module() -> Case:
    return Case(Transfers(), [rows(6, 2), rows(4, 2)])


class TransferringData(Data):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch + 5

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch / 2


@case(captures=1, replays=2)
def transfer_hooks_of_the_datamodule() -> Case:
    return Case(Net(), datamodule=TransferringData())


@case(captures=1, replays=2)
def transfer_hooks_of_both() -> Case:
    return Case(Transfers(), datamodule=TransferringData())
