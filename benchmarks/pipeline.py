"""Stock order against each technique on an emulated HPU with chosen stage times. Figures are emulated, not a Gaudi's.

    python benchmarks/pipeline.py [--batches 60] [--rounds 3] [--program-ms 20] [--prepare-ms 15] [--finish-ms 5]

Every batch takes `prepare` in the dataset, one device program, and `finish` in `on_predict_batch_end`. Stock order does
them one after the other. The floor of a pipeline is its longest stage, plus the time to fill it once.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer import HPUInferenceAccelerator, emulator

OFF = {"hpu_graphs": False, "async_copy": False, "pipelining": False}
ARMS: dict[str, dict[str, Any]] = {
    "stock order": OFF,
    "graphs": OFF | {"hpu_graphs": True},
    "async copies": OFF | {"async_copy": True},
    "pipelining": OFF | {"pipelining": True},
    "all together": {},
}


class Prepared(Dataset[Tensor]):
    """Rows that take host time to prepare."""

    def __init__(self, length: int, seconds: float) -> None:
        self.rows = torch.randn(length, 16, generator=torch.Generator().manual_seed(0))
        self.seconds = seconds

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(self.seconds)
        return self.rows[index]


class Net(LightningModule):
    """One network; how long it takes is the emulator's setting."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(16, 4)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)


class Finish(Callback):
    """Host work on each output."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        time.sleep(self.seconds)


class Watch(Callback):
    """Seconds from the first batch's fetch to the last batch's end, without Lightning's set-up."""

    def on_predict_epoch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_predict_epoch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def run(flags: dict[str, Any], options: argparse.Namespace) -> tuple[list[Tensor], float]:
    """Predictions and seconds of one run."""
    watch = Watch()
    trainer = Trainer(
        accelerator=HPUInferenceAccelerator(**flags),
        callbacks=[watch, Finish(options.finish_ms / 1e3)],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    loader = DataLoader(Prepared(options.batches, options.prepare_ms / 1e3), batch_size=1)
    predictions: Any = trainer.predict(Net(), loader)
    return predictions, watch.seconds


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every arm in every round; the arms take turns. Raises if any arm's predictions differ."""
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    expected: list[Tensor] | None = None
    for _ in range(options.rounds):
        for name, flags in ARMS.items():
            predictions, taken = run(flags, options)
            expected = expected or predictions
            torch.testing.assert_close(predictions, expected)
            seconds[name].append(taken)
    return seconds


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batches", 60), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("program-ms", 20), ("prepare-ms", 15), ("finish-ms", 5)):
        parser.add_argument(f"--{name}", type=float, default=default)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    emulator.install(emulator.EmulatorConfig(program_ms=options.program_ms))
    run({}, argparse.Namespace(**vars(options) | {"batches": 3}))  # warm up
    seconds = measure(options)
    stages = (options.prepare_ms, options.program_ms, options.finish_ms)
    table = Table("arm", "ms/batch (median)", "spread", "of stock", title="emulated HPU (figures are not a Gaudi's)")
    stock = statistics.median(seconds["stock order"])
    for name, taken in seconds.items():
        batch_ms = [1e3 * each / options.batches for each in taken]
        row = (f"{statistics.median(batch_ms):.1f}", f"{min(batch_ms):.1f} to {max(batch_ms):.1f}")
        table.add_row(name, *row, f"{statistics.median(taken) / stock:.2f}")
    console = Console()
    console.print(table)
    # One fill: the first batch passes through every stage before the last batch's time begins to count.
    floor_ms = (options.batches * max(stages) + sum(stages) - max(stages)) / options.batches
    ours_ms = 1e3 * statistics.median(seconds["all together"]) / options.batches
    console.print(f"sum of the stages {sum(stages):g} ms, longest {max(stages):g} ms", highlight=False)
    console.print(f"all together: {ours_ms / floor_ms:.2f} times the pipeline's floor of {floor_ms:.1f} ms/batch")
    console.print("predictions of all arms are equal")


if __name__ == "__main__":
    main()
