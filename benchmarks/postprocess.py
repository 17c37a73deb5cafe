"""A CTC decoder in pure Python: in stock order, in place, in threads and in processes. Emulated.

    python -m benchmarks.postprocess [--batches 80] [--rounds 3] [--compute 15] [--workers 2] [--json FILE]

The network takes `--compute` ms per batch on the emulated device; the decoder is a prefix beam search on its output.
What is shown is the steady state: the time between the end hooks of batches, without the first ones, which capture, and
in which processes start. All arms take turns in every round, and their texts are compared first.
"""

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common import BARE, console, finish, in_turn, parser, quiet
from lightning_hpu_infer import HPUInferenceAccelerator, emulator

LETTERS = "_abcdefghijklmnopqrstuvwxyz"  # the first one is the blank
STEPS, ROWS, BEAMS = 40, 4, 6
FILL = 30
"""Batches that do not count."""


class Acoustic(LightningModule):
    """Random weights give scores that no beam search finds easy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(16, len(LETTERS))

    def predict_step(self, batch: Tensor) -> Tensor:
        return (4 * self.net(batch)).softmax(-1)


def decode(output: Tensor) -> list[str]:
    """The most probable text of each row, by prefix beam search.

    Args:
        output: Probabilities, (rows, steps, letters).
    """
    return [_best_text(row) for row in output.tolist()]


def _best_text(steps: list[list[float]]) -> str:
    # The probability of each prefix, ending with the blank and with its last letter.
    beams = {"": (1.0, 0.0)}
    for step in steps:
        new: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for text, (blank, letter) in beams.items():
            for index, chance in enumerate(step):
                if index == 0:
                    new[text][0] += chance * (blank + letter)
                elif text.endswith(LETTERS[index]):
                    new[text][1] += chance * letter
                    new[text + LETTERS[index]][1] += chance * blank
                else:
                    new[text + LETTERS[index]][1] += chance * (blank + letter)
        best = sorted(new.items(), key=lambda item: -sum(item[1]))[:BEAMS]
        beams = {text: (blank, letter) for text, (blank, letter) in best}
    return next(iter(beams))


class Ends(BasePredictionWriter):
    """Notes when the end hooks of each batch ran, which may run late."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.at: list[float] = []

    def write_on_batch_end(self, *_: Any, **__: Any) -> None:
        self.at.append(time.perf_counter())


def measure(flags: dict[str, Any], batches: int) -> tuple[list[list[str]], float]:
    """The texts, and milliseconds per batch."""
    torch.manual_seed(1)
    loader: Any = DataLoader(torch.randn(ROWS * batches, STEPS, 16), batch_size=ROWS)  # type: ignore[arg-type]
    ends = Ends()
    accelerator = HPUInferenceAccelerator(postprocess=decode, **flags)
    trainer = Trainer(accelerator=accelerator, callbacks=[ends], **BARE)
    texts: Any = trainer.predict(Acoustic(), loader)
    return texts, (ends.at[-1] - ends.at[FILL]) / (len(ends.at) - 1 - FILL) * 1e3


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batches", type=int, default=80, help=f"the first {FILL} do not count")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--compute", type=float, default=15, help="ms per batch on the device")
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    if options.batches < 2 * FILL:
        arguments.error(f"--batches: at least {2 * FILL}, got {options.batches}")
    quiet()
    output = console()
    workers = {"postprocess_workers": options.workers}
    arms: dict[str, dict[str, Any]] = {
        "pipelining=False": {"pipelining": False},
        "in place": {"postprocess_workers": 0},
        "threads": workers | {"postprocess_backend": "thread"},
        "processes": workers | {"postprocess_backend": "process"},
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    emulator.install(emulator.EmulatorConfig(program_ms=options.compute))
    try:
        expected: Any = None
        for number in range(options.rounds):
            for name in in_turn(list(arms), number):
                texts, ms = measure(arms[name], options.batches)
                expected = texts if expected is None else expected
                if texts != expected:
                    raise AssertionError(f"{name}: other texts than before")
                times[name].append(ms)
    finally:
        emulator.uninstall()
    table = Table("arm", "ms per batch, median", "spread", "of `in place`, median", title="emulated HPU: CTC in Python")
    ratios = {}
    for name, found in times.items():
        ratios[name] = [a / b for a, b in zip(found, times["in place"], strict=True)]
        spread = f"{min(found):.1f} to {max(found):.1f}"
        table.add_row(name, f"{statistics.median(found):.1f}", spread, f"{statistics.median(ratios[name]):.2f}")
    output.print(table)
    finish(output, options, "hpu", ms=times, of_in_place=ratios)


if __name__ == "__main__":
    main()
