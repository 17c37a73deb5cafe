"""Rule 10: memory stays flat, however many batches there are."""

import gc
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.helpers import Net, rows, trainer

BATCHES = 2000


class Census(Callback):
    """Counts the batches and outputs that are alive, host and device, as they are at each end hook."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most_alive: list[int] = []
        self.device_bytes: list[int] = []

    def on_predict_batch_start(self, trainer: Trainer, module: Any, batch: Any, *_: Any) -> None:
        self.alive.add(batch)

    def on_predict_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.alive.add(outputs)
        self.most_alive.append(len(self.alive))
        if emulator.is_installed():
            self.device_bytes.append(emulator.stats().bytes_in_use)


@pytest.mark.parametrize("flags", [{}, {"in_flight": 3, "prefetch": 6}, {"hpu_graphs": False}], ids=str)
def test_rule_10_memory_is_flat_over_2000_batches(flags: dict[str, Any], device: str) -> None:
    census = Census()
    tensors = live_tensors()
    ours = trainer(HPUInferenceAccelerator(**flags), callbacks=[census])
    ours.predict(Net(), rows(BATCHES, 1), return_predictions=False)
    in_flight = ours.accelerator.config.in_flight_depth(ours.strategy.root_device.type)  # type: ignore[attr-defined]
    assert len(census.most_alive) == BATCHES
    # Device batches in flight and the newest one, and the output being retired.
    assert max(census.most_alive) <= in_flight + 2
    if device == "emulator":
        first, second = census.device_bytes[10 : BATCHES // 2], census.device_bytes[BATCHES // 2 :]
        # How far the device has come when it is asked is chance, within one batch; a leak would be hundreds.
        assert max(second) <= max(first) + 64
    del ours, census
    assert live_tensors() - tensors <= 1  # the dataset's rows, until its loader's cycle is collected


def live_tensors() -> int:
    gc.collect()  # frees what TorchDynamo holds in C++ for a Trainer that is gone
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
