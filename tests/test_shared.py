"""What is seen of what batches and steps may tell each other, and what is taken to stay as it is."""

import csv
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import LambdaCallback
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, SequentialSampler, Subset
from transformers import PreTrainedTokenizerFast

from lightning_hpu_infer.ahead import reason_against
from tests.dependence import Holder, PartOfModule
from tests.helpers import Net, Rows, trainer


class HeldByCallback(Callback):
    def __init__(self, *held: Any) -> None:
        self.held = {"data": held[0]}


class Collate:
    """What makes batches, or is used for it, without changing itself."""

    def __init__(self, *held: Any) -> None:
        self.held = held
        self.names = ["a", "b"]

    def encode(self, samples: list[Tensor]) -> Tensor:
        return torch.stack(samples)

    __call__ = encode

    def build(self) -> None:
        self.names.append("c")


class Steered(SequentialSampler):
    next = 0


ROWS, NET, MORE = Rows(4), PartOfModule(), PartOfModule()
COLLATE, STEERED = Collate(), Steered(ROWS)
MEAN: Any = [0.5, 0.4]


def capturing(*held: Any) -> Callable[[Any], Any]:
    return lambda samples: (samples, held)


def generator_over(held: Any) -> Iterator[Any]:
    return (held for _ in range(3))


def ends_with(*held: Any) -> Callback:
    return LambdaCallback(on_predict_batch_end=lambda *args: len(held))


class DataOf(LightningDataModule):
    def __init__(self, *held: Any) -> None:
        super().__init__()
        self.held = held
        self.names: list[str] = []

    def collate(self, samples: list[Tensor]) -> Tensor:
        return torch.stack(samples)


class Before(DataOf):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class After(DataOf):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class AfterWithIt(DataOf):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.changed(batch)

    def changed(self, batch: Any) -> Any:
        return batch, self.held


AFTER, DATA = After(), DataOf()
DATA.trainer = trainer("cpu")
Case = tuple[Callable[[], Any], Callable[[], Any]]
AGAINST: dict[str, Case] = {
    "the module holds it": (lambda: DataLoader(ROWS), lambda: PartOfModule(data=ROWS)),
    "a network of the module holds it": (lambda: DataLoader(ROWS), lambda: nn.Sequential(PartOfModule(data=ROWS))),
    "a callback holds it": (lambda: DataLoader(ROWS), lambda: HeldByCallback(ROWS)),
    "a callback's function holds it": (lambda: DataLoader(ROWS), lambda: ends_with(ROWS)),
    "the module holds its dataloader": (lambda: DataLoader(ROWS), lambda: PartOfModule(loader=DataLoader(ROWS))),
    "in a list": (lambda: DataLoader(ROWS), lambda: PartOfModule(data=[ROWS])),
    "a part of it": (lambda: DataLoader(ConcatDataset([Subset(ROWS, [0]), Rows(2)])), lambda: PartOfModule(data=ROWS)),
    "a loader that is none of torch's": (lambda: ROWS, lambda: PartOfModule(data=ROWS)),
    "it holds the module": (lambda: DataLoader(Holder(NET)), lambda: NET),
    "it holds a network of the module": (lambda: DataLoader(Holder([NET.net[0]])), lambda: NET),
    "its transform holds the module": (lambda: DataLoader(Holder(Collate(NET))), lambda: NET),
    "it holds the Trainer": (lambda: DataLoader(Holder(DATA.trainer)), Net),
    "collate is a method of the module": (lambda: DataLoader(ROWS, collate_fn=NET.collate), lambda: NET),
    "collate has closed over the module": (lambda: DataLoader(ROWS, collate_fn=capturing(NET)), lambda: NET),
    "collate is called with the module": (lambda: DataLoader(ROWS, collate_fn=partial(print, NET)), lambda: NET),
    "the module holds collate": (lambda: DataLoader(ROWS, collate_fn=COLLATE), lambda: PartOfModule(c=COLLATE)),
    "and collate is a method": (lambda: DataLoader(ROWS, collate_fn=COLLATE.encode), lambda: PartOfModule(c=COLLATE)),
    "the module holds the sampler": (lambda: DataLoader(ROWS, sampler=STEERED), lambda: PartOfModule(s=STEERED)),
    "and there are workers": (
        lambda: DataLoader(ROWS, sampler=STEERED, num_workers=1),
        lambda: PartOfModule(s=STEERED),
    ),
    "a batch sampler": (
        lambda: DataLoader(ROWS, batch_sampler=BatchSampler(STEERED, 2, drop_last=False)),
        lambda: PartOfModule(s=STEERED),
    ),
    "a datamodule's early hook": (lambda: DataLoader(ROWS), Before),
    "a datamodule's collate and late hook": (lambda: DataLoader(ROWS, collate_fn=AFTER.collate), lambda: AFTER),
    "a datamodule's late hook uses it": (lambda: DataLoader(ROWS), lambda: AfterWithIt(ROWS)),
    "a generator that names it": (lambda: (NET.scale for _ in range(3)), lambda: NET),
    "a generator that has closed over it": (lambda: generator_over(NET), lambda: NET),
    "a map": (lambda: map(capturing(NET), [1]), lambda: NET),
    "a map in others": (lambda: enumerate(filter(None, map(NET.collate, []))), lambda: NET),
    "a cursor": (lambda: DataLoader(Holder(sqlite3.connect(":memory:").cursor())), Net),
    "a thread's own": (lambda: DataLoader(Holder([threading.local()])), Net),
    "a thread's own in collate": (lambda: DataLoader(ROWS, collate_fn=Collate(threading.local())), Net),
}


@pytest.mark.parametrize("case", AGAINST)
def test_what_is_known_against_it(case: str) -> None:
    loader, listener = AGAINST[case]
    assert reason_against([DataLoader(Rows(2)), loader()], [Net(), listener(), None])


class Writes(PartOfModule):
    """Fills what it holds, as steps that keep something for later ones do."""

    state: Any
    named: Any
    own: Any
    labels: Any

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.state["last"] = batch
        self.named.last = batch
        self.own.push(batch)
        self.labels.append("more")


class State:
    def __init__(self) -> None:
        self.rows: list[Any] = [0]
        self.last = 0

    def push(self, row: Any) -> None:
        self.rows.append(row)


class Settings:
    lr = 0.1


SHARED: dict[str, Any] = {
    "list": [1.0],
    "empty list": [],
    "deque": deque("a"),
    "set": {1},
    "array": np.zeros(2),
    "tensor": torch.zeros(2),
    "bytes": bytearray(2),
    "empty dict": {},
    "generator": torch.Generator(),
    "queue": queue.SimpleQueue[int](),
    "event": threading.Event(),
}
WRITTEN: dict[str, Any] = {
    "state": {"last": 0},
    "named": SimpleNamespace(last=0),
    "own": State(),
    "labels": ["cat", "dog"],
}
READ: dict[str, Any] = {
    "settings": {"lr": 0.1, "layers": [4, 4]},
    "namespace": SimpleNamespace(lr=0.1),
    "labels": ["cat", "dog"],
    "table": {"cat": 0, "dog": 1},
    "tuple": (1.0, [2]),
    "own class": Settings(),
    "own tokenizer": Collate(),
    "tokenizer": PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))),
    "function": capturing,
    "lock": threading.Lock(),
}


def sharing(value: Any, name: str, module: type[PartOfModule]) -> Iterator[str]:
    """Reasons, where a dataset, a collate function and a datamodule's share something with a module or a callback."""
    for listener in (module(**{name: value}), HeldByCallback([value])):
        yield reason_against([DataLoader(Holder(value))], [listener])
        yield reason_against([DataLoader(ROWS, collate_fn=capturing(value))], [listener])
        yield reason_against([DataLoader(ROWS, collate_fn=partial(print, value))], [listener])
        yield reason_against([DataLoader(ROWS, collate_fn=DataOf(value).collate)], [listener])


@pytest.mark.parametrize("kind", SHARED)
def test_state_that_both_hold(kind: str) -> None:
    reasons = list(sharing(SHARED[kind], "rows", PartOfModule))[:4]  # a callback's dictionary has settings
    assert all(f"hold the same {type(SHARED[kind]).__name__}" in reason for reason in reasons), reasons


@pytest.mark.parametrize("kind", WRITTEN)
def test_an_object_that_both_hold_and_the_step_is_seen_to_change(kind: str) -> None:
    assert all(list(sharing(WRITTEN[kind], kind, Writes))[:4])
    assert not any(sharing(WRITTEN[kind], kind, PartOfModule)) or kind == "own"


@pytest.mark.parametrize("kind", READ)
def test_what_both_hold_and_nobody_is_seen_to_change(kind: str) -> None:
    assert not any(sharing(READ[kind], "held", PartOfModule))
    assert not any(sharing(READ[kind], "held", Writes))


NOTHING: dict[str, Case] = {
    "another dataset": (lambda: DataLoader(Rows(4)), lambda: PartOfModule(data=Rows(4))),
    "worker processes": (lambda: DataLoader(ROWS, num_workers=1), lambda: PartOfModule(data=ROWS)),
    "a lock": (lambda: DataLoader(Holder(threading.Lock())), Net),
    "a list": (lambda: DataLoader([torch.ones(4)] * 100_000), Net),  # type: ignore[arg-type]
    "an iterator": (lambda: iter([torch.ones(4)]), Net),
    "the datamodule holds the dataset": (lambda: DataLoader(ROWS), lambda: DataOf(ROWS)),
    "and changes batches on the device": (lambda: DataLoader(ROWS), lambda: After(ROWS)),
    "its collate function": (lambda: DataLoader(ROWS, collate_fn=DATA.collate), lambda: DATA),
    "one network for two modules": (lambda: DataLoader(Holder(MORE)), lambda: NET),
    "a transform of a library": (lambda: DataLoader(Holder(csv.DictReader([], MEAN))), lambda: PartOfModule(mean=MEAN)),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_is_known_against_it(case: str) -> None:
    loader, listener = NOTHING[case]
    assert not reason_against([loader()], [listener(), None])
