"""Batches are prepared ahead only where nothing is known against it."""

import asyncio
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.ahead import reason_against
from tests.helpers import Net, Rows, assert_equal, predict

HPU = "hpu"


class Windows(Dataset[Tensor]):
    """Each window has what was predicted for the one before it."""

    def __init__(self) -> None:
        self.series = [0.1, 0.2, 0.3, 0.4]
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        self.threads.add(threading.current_thread().name)
        return torch.tensor(self.series[-4:])


class Forecast(LightningModule):
    def __init__(self, data: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.data = nn.Linear(4, 1), data

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        predicted = self.net(batch)
        self.data.series.append(predicted.item())
        return predicted


@pytest.mark.parametrize("flags", [{}, {"in_flight": 3}, {"pipelining": "auto"}, {"pipelining": False}], ids=str)
def test_a_dataset_that_the_step_adds_to(flags: dict[str, Any], device: str) -> None:
    expected, actual = [
        predict(accelerator, Forecast(data), DataLoader(data, 1))
        for data, accelerator in ((Windows(), "cpu"), (Windows(), HPUInferenceAccelerator(**flags, hpu_graphs=False)))
    ]
    assert_equal(actual, expected)


@pytest.mark.usefixtures("emulated")
def test_whoever_chooses_prefetch_gets_it() -> None:
    data = Windows()
    predict(HPUInferenceAccelerator(prefetch=2, hpu_graphs=False), Forecast(data), DataLoader(data, 1))
    assert data.threads == {"hpu-infer-prefetch"}


class Recurrent(Net):
    """Its batches are changed by what was predicted for the one before."""

    before: Any = 0.0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch + self.before

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        predicted = self.net(batch)
        self.before = predicted.sum().item()
        return predicted


@pytest.mark.parametrize("flags", [{}, {"in_flight": 3}, {"pipelining": "auto"}], ids=str)
def test_a_transfer_hook_that_uses_what_the_step_has_written(flags: dict[str, Any], device: str) -> None:
    expected = predict("cpu", Recurrent(), DataLoader(Rows(12), 2))
    assert_equal(
        predict(HPUInferenceAccelerator(**flags, hpu_graphs=False), Recurrent(), DataLoader(Rows(12), 2)), expected
    )


class Table(Dataset[Tensor]):
    """A database that may be used in the thread only that has opened it."""

    def __init__(self) -> None:
        self.rows = sqlite3.connect(":memory:")
        self.rows.execute("create table t (i integer, x real)")
        self.rows.executemany("insert into t values (?, ?)", [(i, i / 7) for i in range(12)])

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self.rows.execute("select x from t where i = ?", (index,)).fetchone() * 4)


def test_a_database_of_the_main_thread(device: str) -> None:
    expected = predict("cpu", Net(), DataLoader(Table(), 2))
    assert_equal(predict(HPUInferenceAccelerator(), Net(), DataLoader(Subset(Table(), range(12)), 2)), expected)


class Products(Rows):
    def __getitem__(self, index: int) -> Tensor:
        return (self.rows[index : index + 1] @ torch.eye(4)).float()[0]


class Same(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch * 1


def test_autocast_around_the_run_holds_for_the_dataset(device: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = predict("cpu", Same(), DataLoader(Products(12), 2))
        actual = predict(HPUInferenceAccelerator(), Same(), DataLoader(Products(12), 2))
    assert_equal(actual, expected)
    assert not torch.equal(torch.cat(expected), Rows(12).rows)  # it has lost precision


class Holder(Dataset[Tensor]):
    def __init__(self, held: Any) -> None:
        self.held = held


def test_an_event_loop_belongs_to_its_thread() -> None:
    loop = asyncio.new_event_loop()
    assert "holds what belongs to the main thread" in reason_against([DataLoader(Holder(loop))], [])
    loop.close()


# Batches that are on the device already


class Threads:
    """Notes which threads made batches."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def collate(self, samples: list[Tensor]) -> Tensor:
        self.names.append(threading.current_thread().name)
        return torch.stack(samples).to(HPU if emulator.is_installed() else "cpu")


def test_rule_2_a_dataset_on_the_device_is_read_by_the_main_thread(device: str) -> None:
    expected = predict("cpu", Net(), DataLoader(Rows(12), 2))
    threads = Threads()
    rows = Rows(12).rows.to(HPU if device == "emulator" else "cpu")
    loader = DataLoader(TensorDataset(rows), 2, collate_fn=lambda samples: threads.collate([x for (x,) in samples]))
    assert_equal(predict(HPUInferenceAccelerator(), Net(), loader), expected)
    assert set(threads.names) == {"MainThread"}


@pytest.mark.parametrize("flags", [{}, {"prefetch": 4, "in_flight": 3}, {"pipelining": "auto"}], ids=str)
def test_rule_2_batches_that_collate_puts_on_the_device_are_not_made_ahead(flags: dict[str, Any], device: str) -> None:
    expected = predict("cpu", Net(), [DataLoader(Rows(12), 2), DataLoader(Rows(6), 2)])
    threads = Threads()
    loaders = [DataLoader(Rows(12), 2, collate_fn=threads.collate), DataLoader(Rows(6), 2)]
    assert_equal(predict(HPUInferenceAccelerator(**flags), Net(), loaders), expected)
    if device == "emulator":
        # That they are on the device is seen at the first.
        assert threads.names == ["hpu-infer-prefetch"] + ["MainThread"] * 5


class DeviceBuffer:
    """A loader that fills the same memory of the device for every batch."""

    def __init__(self, device: str) -> None:
        self.buffer = torch.zeros(2, 4, device=device)

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Tensor]:
        return (self.buffer.fill_(number) for number in range(6))


@pytest.mark.parametrize("flags", [{}, {"prefetch": 4, "in_flight": 3}], ids=str)
def test_a_loader_that_fills_memory_of_the_device_again(flags: dict[str, Any], device: str) -> None:
    expected = predict("cpu", Net(), DeviceBuffer("cpu"))
    assert_equal(
        predict(HPUInferenceAccelerator(**flags), Net(), DeviceBuffer(HPU if emulator.is_installed() else "cpu")),
        expected,
    )


class OwnCompile(Net):
    """Has a part that the user compiles, which TorchDynamo traces during the run."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled: Any = torch.compile(nn.Linear(3, 3), backend="eager")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.compiled(self.net(batch))


class Noise(Rows):
    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(4)


@pytest.mark.usefixtures("device", "fresh_dynamo")
def test_random_numbers_of_a_dataset_beside_a_part_that_the_user_compiles() -> None:
    def run(accelerator: Any) -> Any:
        module = OwnCompile()
        torch.manual_seed(3)
        return predict(accelerator, module, DataLoader(Noise(24), 2))

    torch.manual_seed(0)
    assert "compiled by `torch.compile`" in reason_against([DataLoader(Noise(2))], [OwnCompile()])
    module_seed = torch.random.get_rng_state()
    expected = run("cpu")
    torch.random.set_rng_state(module_seed)
    assert_equal(run(HPUInferenceAccelerator(hpu_graphs=False)), expected)
