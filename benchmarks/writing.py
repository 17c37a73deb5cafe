"""Predictions written while they are made: by `PredictionWriter`, by callbacks in the main thread, and not at all.

    python -m benchmarks.writing [--batches 130] [--rounds 3] [--json FILE]

In two mixes on the emulated HPU the device, or the dataset, takes 40 ms per batch and the other one 8; on the CPU a
real network takes all of the time. A batch's prediction is `--rows` times 1024 float32. The callbacks to compare with
do what users write: `torch.save` into a file per batch, and a Parquet file that grows. What is shown is the steady
state: the time between the ends of batches, without the first ones. Arms take turns; before, what each of them has
written is read back and compared with stock Lightning's predictions.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from pyarrow import parquet
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import BARE, console, finish, in_turn, parser, quiet
from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter, emulator, read_predictions

WIDTH = 1024
FILL = 60
"""Batches that do not count."""


class Mix(NamedTuple):
    """Milliseconds per batch of the dataset and of the emulated device; hidden layers of the network."""

    prepare: float
    compute: float | None
    layers: int


MIXES = {"hpu, device-bound": Mix(8, 40, 0), "hpu, input-bound": Mix(40, 8, 0), "cpu": Mix(0, None, 2)}


class Prepared(Dataset[Tensor]):
    """Batches that take host time to prepare."""

    def __init__(self, batches: int, rows: int, milliseconds: float) -> None:
        self.data = torch.randn(batches * rows, 64, generator=torch.Generator().manual_seed(0))
        self.rows, self.milliseconds = rows, milliseconds

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The samples of one batch."""
        time.sleep(self.milliseconds / 1e3)
        return list(self.data[indices])


class Wide(LightningModule):
    """Random weights."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [layer for _ in range(layers) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(64, WIDTH), *hidden)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)


class SavedByTorch(BasePredictionWriter):
    """A file per batch, in the main thread."""

    def __init__(self, path: Path) -> None:
        super().__init__("batch")
        self.path = path

    def write_on_batch_end(
        self, trainer: Any, module: Any, prediction: Tensor, indices: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        torch.save({"index": indices, "prediction": prediction.cpu()}, self.path / f"{batch_idx:06d}.pt")


class SavedByArrow(BasePredictionWriter):
    """A Parquet file that grows, in the main thread."""

    def __init__(self, path: Path) -> None:
        super().__init__("batch")
        self.path = path
        self.writer: Any = None

    def write_on_batch_end(
        self, trainer: Any, module: Any, prediction: Tensor, indices: Any, batch: Any, *_: Any
    ) -> None:
        values = pa.FixedSizeListArray.from_arrays(pa.array(prediction.cpu().numpy().reshape(-1)), WIDTH)
        table = pa.table({"index": pa.array(indices, pa.int64()), "prediction": values})
        if self.writer is None:
            self.writer = parquet.ParquetWriter(self.path / "all.parquet", table.schema, compression="zstd")
        self.writer.write_table(table)

    def on_predict_end(self, *_: Any) -> None:
        self.writer.close()


class Ends(BasePredictionWriter):
    """Notes when the end hooks of each batch have run. The last of the callbacks."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.at: list[float] = []

    def write_on_batch_end(self, *_: Any, **__: Any) -> None:
        self.at.append(time.perf_counter())


ARMS: dict[str, Callable[[Path], list[Any]]] = {
    "no writer": lambda path: [],
    "PredictionWriter": lambda path: [PredictionWriter(path)],
    "torch.save": lambda path: [SavedByTorch(path)],
    "pyarrow": lambda path: [SavedByArrow(path)],
}


def measure(arm: str, mix: Mix, batches: int, rows: int, path: Path) -> float:
    """Milliseconds per batch; what it wrote is in the folder."""
    ends = Ends()
    trainer = Trainer(accelerator=HPUInferenceAccelerator(), callbacks=[*ARMS[arm](path), ends], **BARE)
    loader = DataLoader(Prepared(batches, rows, mix.prepare), rows)
    trainer.predict(Wide(mix.layers), loader, return_predictions=False)
    return (ends.at[-1] - ends.at[FILL]) / (len(ends.at) - 1 - FILL) * 1e3


def read_back(arm: str, path: Path) -> np.ndarray[Any, Any] | None:
    """What an arm has written, in the dataset's order."""
    if arm == "PredictionWriter":
        return read_predictions(path)["prediction"].combine_chunks().to_numpy_ndarray()
    if arm == "torch.save":
        return torch.cat([torch.load(file)["prediction"] for file in sorted(path.glob("*.pt"))]).numpy()
    if arm == "pyarrow":
        column = parquet.read_table(path / "all.parquet")["prediction"].combine_chunks()
        return column.flatten().to_numpy().reshape(-1, WIDTH)
    return None


def check(mix: Mix, rows: int, batches: int = 5) -> None:
    """Compare what all arms write with stock Lightning's predictions.

    Raises:
        AssertionError: If they differ.
    """
    stock = Trainer(accelerator="cpu", **BARE)
    wanted: Any = stock.predict(Wide(mix.layers), DataLoader(Prepared(batches, rows, 0), rows))
    for arm in ARMS:
        with tempfile.TemporaryDirectory() as folder:
            ends = Ends()
            trainer = Trainer(accelerator=HPUInferenceAccelerator(), callbacks=[*ARMS[arm](Path(folder)), ends], **BARE)
            trainer.predict(Wide(mix.layers), DataLoader(Prepared(batches, rows, 0), rows), return_predictions=False)
            found = read_back(arm, Path(folder))
        if found is not None:
            np.testing.assert_allclose(found, torch.cat(wanted).numpy(), rtol=1e-4, atol=1e-5, err_msg=arm)


def rounds_of(mix: Mix, options: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds per batch of each arm, by round."""
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(options.rounds):
        for arm in in_turn(list(ARMS), number):
            with tempfile.TemporaryDirectory() as folder:
                times[arm].append(measure(arm, mix, options.batches, options.rows, Path(folder)))
    return times


def row_of(arm: str, times: Sequence[float], ratios: Sequence[float]) -> list[str]:
    """A line of the table."""
    spread = f"{min(times):.1f} to {max(times):.1f}"
    of_none = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return [arm, f"{statistics.median(times):.1f}", spread, of_none]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batches", type=int, default=130, help=f"the first {FILL} do not count")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--rows", type=int, default=256, help="per batch")
    options = arguments.parse_args()
    if options.batches < 2 * FILL:
        arguments.error(f"--batches: at least {2 * FILL}, got {options.batches}")
    quiet()
    output = console()
    ms: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, dict[str, list[float]]] = {}
    for name, mix in MIXES.items():
        if mix.compute is not None:
            emulator.install(emulator.EmulatorConfig(program_ms=mix.compute))
        try:
            check(mix, options.rows)
            ms[name] = rounds_of(mix, options)
        finally:
            emulator.uninstall()
        none = ms[name]["no writer"]
        ratios[name] = {arm: [a / b for a, b in zip(found, none, strict=True)] for arm, found in ms[name].items()}
        table = Table("arm", "ms per batch, median", "spread", "of `no writer`, median", title=name)
        for arm, found in ms[name].items():
            table.add_row(*row_of(arm, found, ratios[name][arm]))
        output.print(table)
    finish(output, options, "hpu", "cpu", ms=ms, of_no_writer=ratios)


if __name__ == "__main__":
    main()
