"""Stock Lightning against the plugin where there is no HPU: on the CPU it must not cost anything.

    python benchmarks/cpu.py [--rounds 9]

Arms take turns in one process; predictions are compared first. Without an HPU only the pipelined loop is at work.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator

ARMS: dict[str, Callable[[], Any]] = {
    "stock": lambda: "cpu",
    "default": HPUInferenceAccelerator,
    "prefetch=0": lambda: HPUInferenceAccelerator(prefetch=0),
    "defer_hooks=False": lambda: HPUInferenceAccelerator(defer_hooks=False),
    "pipelining=False": lambda: HPUInferenceAccelerator(pipelining=False),
}


class Net(LightningModule):
    """One linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(width, width)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)


class Watch(Callback):
    """Seconds from the first batch's fetch to the last batch's end."""

    def on_predict_epoch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_predict_epoch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def run(accelerator: Any, width: int, batches: int, size: int) -> tuple[list[Tensor], float]:
    """Predictions, and microseconds per batch."""
    watch = Watch()
    trainer = Trainer(
        accelerator=accelerator, callbacks=[watch], logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    rows = torch.randn(batches * size, width, generator=torch.Generator().manual_seed(0))
    predictions: Any = trainer.predict(Net(width), DataLoader(rows, size))  # type: ignore[arg-type]
    return predictions, watch.seconds / batches * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|No HPU was found")
    torch.set_num_threads(1)
    for width, batches, size in ((8, 2000, 1), (1024, 300, 64)):
        times: dict[str, list[float]] = {name: [] for name in ARMS}
        expected = run("cpu", width, batches, size)[0]
        for _ in range(rounds):
            for name, accelerator in ARMS.items():
                predictions, taken = run(accelerator(), width, batches, size)
                torch.testing.assert_close(predictions, expected, rtol=0, atol=0)
                times[name].append(taken)
        title = f"CPU, Linear({width}), {batches} batches of {size}"
        table = Table("arm", "us/batch (median)", "spread", "of stock", title=title)
        stock = statistics.median(times["stock"])
        for name, each in times.items():
            median = statistics.median(each)
            row = (f"{median:.0f}", f"{min(each):.0f} to {max(each):.0f}", f"{median / stock:.2f}")
            table.add_row(name, *row)
        Console().print(table)
    Console().print("predictions of all arms are equal")


if __name__ == "__main__":
    main()
