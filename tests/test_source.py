"""Each batch keeps its values, whatever memory its loader fills again."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline, emulator
from lightning_hpu_infer.ownership import may_reuse_memory
from tests.helpers import Rows, assert_equal, trainer

BATCHES = 7
WIDTH = 4
LARGE = 2**18  # float32 of 1 MiB: the bridge reads such memory after the call that copies it has returned.


class Window:
    """Memory of many kinds that is filled anew for each batch, as readers of large files do."""

    def __init__(self, width: int = WIDTH) -> None:
        self.x = torch.zeros(2, width)
        self.ids = torch.zeros(2, width, dtype=torch.int64)
        self.raw = np.zeros((2, width), np.float32)
        self.names = [""]
        self.object = SimpleNamespace(x=torch.zeros(2, width), fixed="fixed")
        self.batch: dict[str, Any] = {
            "x": self.x,
            "deep": [{"ids": self.ids}, (self.raw, "constant")],
            "names": self.names,
            "shared": torch.from_numpy(self.raw),
            "bytes": bytearray(2),
            "object": self.object,
        }

    def show(self, number: int) -> dict[str, Any]:
        self.x.fill_(number / 3)
        self.ids.fill_(number)
        self.raw.fill(number / 7)
        self.names[0] = f"batch {number}"
        self.batch["bytes"][:] = bytes([number, number])
        self.object.x.fill_(number / 5)
        self.batch["number"] = number
        return self.batch


def values(batch: dict[str, Any]) -> list[Any]:
    """All that a batch of a `Window` says, in memory of its own."""
    (inner, (raw, constant)), held = batch["deep"], batch["object"]
    if isinstance(raw, torch.Tensor):  # as a pipeline gives it to its model
        raw = raw.cpu().numpy()
    tensors = [batch["x"], inner["ids"], batch["shared"], held.x]
    plain = [constant, list(batch["names"]), bytes(batch["bytes"]), batch["number"], held.fixed]
    return [*(tensor[:, :1].cpu().clone() for tensor in tensors), float(raw.mean()), *plain]


class Loader:
    """A loader of the user's own."""

    def __init__(self, width: int) -> None:
        self.window = Window(width)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.window.show(number) for number in range(BATCHES))

    def __len__(self) -> int:
        return BATCHES


class Windows(Dataset[dict[str, Any]]):
    def __init__(self, width: int) -> None:
        self.window = Window(width)

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.window.show(index)


class LoaderOfLoader(DataLoader[Any]):
    """A loader that puts each collated batch into its own memory."""

    window = Window()

    def __iter__(self) -> Any:
        return (self.window.show(int(number)) for number in super().__iter__())


LOADERS: dict[str, Callable[[int], Any]] = {
    "own loader": Loader,
    "first sample": lambda width: DataLoader(Windows(width), collate_fn=lambda samples: samples[0]),
    "no batching": lambda width: DataLoader(Windows(width), batch_size=None, collate_fn=lambda sample: sample),
    "DataLoader that is overridden": lambda width: LoaderOfLoader(range(BATCHES)),  # type: ignore[arg-type]
}


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(WIDTH, 3)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        raw = torch.from_numpy(batch["deep"][1][0][:, :WIDTH]).to(self.device)
        ids = batch["deep"][0]["ids"][:, :WIDTH]
        return self.net(batch["x"][:, :WIDTH]), self.net(raw), ids + 1, batch["number"], list(batch["names"])


class Keeps(Callback):
    """Sees what a batch says when its end hook runs."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_batch_end(self, t: Any, m: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen.append(values(batch))


FLAGS: list[dict[str, Any]] = [
    {},
    {"prefetch": 5, "in_flight": 3},
    {"prefetch": 0, "in_flight": 3},
    {"prefetch": 3, "in_flight": 0, "async_copy": False},
    {"in_flight": 2, "async_copy": False, "async_output": True},
    {"defer_hooks": False, "prefetch": 2},
    {"pipelining": "auto"},
    {"pipelining": False},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("loader", LOADERS)
def test_rule_7_memory_that_the_loader_fills_again(loader: str, flags: dict[str, Any], device: str) -> None:
    found = []
    for accelerator in ("cpu", HPUInferenceAccelerator(**flags, hpu_graphs=False)):
        keeps = Keeps()
        predictions = trainer(accelerator, callbacks=[keeps]).predict(Net(), LOADERS[loader](WIDTH))
        found.append((predictions, keeps.seen))
    assert [seen[8] for seen in found[0][1]] == list(range(BATCHES))  # stock Lightning has the truth
    assert_equal(found[1], found[0])


def test_rule_7_large_memory_that_the_device_reads_late(emulated: None) -> None:
    """With nothing prepared ahead, only the copies that were not waited for still read it."""
    with emulator.paused("h2d"):
        pipeline = InferencePipeline(nn.Identity(), config=InferenceConfig(async_copy=False, in_flight=BATCHES))
        window = Window(LARGE)
        for number in range(BATCHES):
            pipeline.push(window.show(number))
    for number in range(BATCHES):
        assert values(pipeline.pop())[0].flatten().tolist() == pytest.approx([number / 3] * 2)
    pipeline.close()


@pytest.mark.parametrize("async_copy", [True, False])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_rule_7_memory_that_is_filled_again_without_a_trainer(prefetch: int, async_copy: bool, device: str) -> None:
    config = InferenceConfig(prefetch=prefetch, in_flight=2, async_copy=async_copy, hpu_graphs=False)
    with InferencePipeline(Lookup(), config=config) as pipeline:
        outputs = list(pipeline.predict(Loader(WIDTH)))
    assert_equal(outputs, [values(Window().show(number))[:5] for number in range(BATCHES)])


class Lookup(nn.Module):
    def forward(self, batch: Any) -> list[Any]:
        return values(batch)[:5]


FRESH: dict[str, Callable[[], Any]] = {
    "default_collate": lambda: DataLoader(Rows(8), 2),
    "workers": lambda: DataLoader(Rows(8), 2, num_workers=1, collate_fn=torch.stack),
    "list": lambda: list(Rows(8).rows.split(2)),
}


@pytest.mark.parametrize("loader", FRESH)
def test_memory_that_is_new_for_each_batch_is_not_copied(loader: str) -> None:
    assert not may_reuse_memory(FRESH[loader]())


def test_the_step_gets_what_default_collate_made(device: str) -> None:
    made: list[int] = []

    class Hook(Net):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            made.append(id(batch))
            return batch

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            moved.append(id(batch))
            return batch

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch_idx

    moved: list[int] = []
    trainer(HPUInferenceAccelerator(prefetch=2, async_copy=False)).predict(Hook(), DataLoader(Rows(8), 2))
    assert moved == made


def test_nothing_is_copied_on_the_cpu_by_default() -> None:
    """Batch after batch, as in stock Lightning, whose step gets the loader's own memory and may write to it."""
    loader = Loader(WIDTH)

    class Writes(Net):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch["x"] is loader.window.x
            return super().predict_step(batch, batch_idx)

    assert len(trainer(HPUInferenceAccelerator()).predict(Writes(), loader) or []) == BATCHES


class AddsOne(LightningModule):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch.add_(1).clone()


@pytest.mark.parametrize("flags", [{"prefetch": 2}, {"in_flight": 2, "prefetch": 0}], ids=str)
def test_a_step_that_writes_into_its_batch_writes_into_a_copy(flags: dict[str, Any]) -> None:
    for accelerator, changed in (("cpu", 1), (HPUInferenceAccelerator(**flags), 0)):
        rows = Rows(4)
        before = rows.rows.clone()
        predictions = trainer(accelerator).predict(
            AddsOne(), DataLoader(rows, 1, collate_fn=lambda samples: samples[0])
        )
        assert_equal(predictions, list(before + 1))
        assert_equal(rows.rows, before + changed)
