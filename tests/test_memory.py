"""Rule 10: memory stays flat, however many batches there are."""

import gc
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter, emulator
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


@pytest.mark.parametrize(
    "flags",
    [
        {},
        pytest.param({"in_flight": 3, "prefetch": 6}, marks=pytest.mark.full),
        pytest.param({"hpu_graphs": False}, marks=pytest.mark.full),
    ],
    ids=str,
)
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


@pytest.mark.full
def test_a_writer_keeps_little_of_each_batch(tmp_path: Path) -> None:
    """Beside what waits for its file, which is committed every half second here."""
    numbers = 9000
    traced: list[int] = []

    class Traced(Callback):
        def on_predict_batch_end(self, t: Trainer, m: Any, o: Any, b: Any, batch_idx: int, *_: Any) -> None:
            if batch_idx in (numbers // 3, numbers - 1):
                gc.collect()
                traced.append(tracemalloc.get_traced_memory()[0])

    writer = PredictionWriter(tmp_path, seconds_per_file=0.5, queue_bytes=64 << 10)
    tracemalloc.start()
    try:
        ours = trainer(HPUInferenceAccelerator(defer_hooks=True), [writer, Traced()])
        ours.predict(Net(), rows(numbers, 1), return_predictions=False)
    finally:
        tracemalloc.stop()
    first, last = traced
    assert (last - first) / (numbers * 2 / 3) < 48


def live_tensors() -> int:
    gc.collect()  # frees what TorchDynamo holds in C++ for a Trainer that is gone
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
