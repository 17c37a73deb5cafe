"""Host time per batch with and without graphs, and what verifying them costs. Figures are emulated, not a Gaudi's.

    python -m benchmarks.graphs [--rounds 5] [--batches 24] [--json FILE]

Five models as users bring them: timm's resnet18 and a small ViT, BERT and Wav2Vec2 with random weights, MiniLM with its
own on sentences of Python's documentation. Host time is what the main thread spends in `predict_step`: the Python and
the queueing that a graph saves. The emulator queues each op in Python, the bridge in C++, so the ratio is not one to
expect of a Gaudi. Predictions of all arms are compared first.

For padding waste and captures of buckets see `benchmarks/lengths.py`.
"""

import statistics
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common import BARE, OFF, console, finish, parser, quiet
from examples.embed_sentences import SentenceEmbedder, loader_of, sentences_of
from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.contract.models import MODELS

ARMS: dict[str, dict[str, Any]] = {
    "plain": OFF,
    "graphs": OFF | {"hpu_graphs": True},
    "graphs, verify_graphs=0": OFF | {"hpu_graphs": True, "verify_graphs": 0},
    "graphs, verify_graphs=8": OFF | {"hpu_graphs": True, "verify_graphs": 8},
}


class Timed(LightningModule):
    """Takes the host time of each step."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seconds: list[float] = []

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        start = time.perf_counter()
        output = self.net.predict_step(batch, batch_idx) if isinstance(self.net, LightningModule) else self.net(**batch)
        self.seconds.append(time.perf_counter() - start)
        return output if isinstance(output, Tensor) else output.logits


def cases(batches: int) -> dict[str, tuple[nn.Module, DataLoader[Any]]]:
    """Model and batches by name."""
    found: dict[str, tuple[nn.Module, DataLoader[Any]]] = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        net, inputs = make()
        rolled = [{key: value.roll(i, 0) for key, value in inputs.items()} for i in range(batches)]
        found[name] = (net.eval(), DataLoader(rolled, batch_size=None))  # type: ignore[arg-type]
    sentences = sentences_of("\n\n".join(topics.values()))[: 8 * batches]
    found["MiniLM"] = (SentenceEmbedder(), loader_of(sentences, 8, 32))
    return found


def run(flags: dict[str, Any], net: nn.Module, loader: DataLoader[Any]) -> tuple[list[Tensor], dict[str, float]]:
    """Predictions, and milliseconds and counts of one run."""
    module = Timed(net)
    trainer = Trainer(accelerator=HPUInferenceAccelerator(**flags), **BARE)
    emulator.reset_stats()
    start = time.perf_counter()
    predictions: Any = trainer.predict(module, loader)
    total = time.perf_counter() - start
    steady = module.seconds[len(module.seconds) // 2 :]
    return predictions, {
        "host_ms": 1e3 * statistics.median(steady),
        "total_ms": 1e3 * total / len(module.seconds),
        "captures": emulator.stats().captures,
    }


def measure(rounds: int, batches: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Figures by model and arm, one per round; arms take turns. Raises if predictions differ."""
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, (net, loader) in cases(batches).items():
        figures[name] = {arm: [] for arm in ARMS}
        expected: list[Tensor] | None = None
        for _ in range(rounds):
            for arm, flags in ARMS.items():
                predictions, figure = run(flags, net, loader)
                expected = expected or predictions
                torch.testing.assert_close(predictions, expected, rtol=1e-3, atol=1e-4)
                figures[name][arm].append(figure)
    return figures


def median(figures: list[dict[str, float]], name: str) -> float:
    return statistics.median(figure[name] for figure in figures)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batches", type=int, default=24)
    options = arguments.parse_args()
    quiet()
    emulator.install()
    figures = measure(options.rounds, options.batches)
    table = Table(
        "model", "arm", "host ms/batch", "spread", "of plain", "whole run ms/batch", "of plain", "captures",
        title=f"emulated HPU (figures are not a Gaudi's), {options.rounds} rounds of {options.batches} batches",
    )  # fmt: skip
    for name, arms in figures.items():
        plain = arms["plain"]
        for arm, found in arms.items():
            host = [figure["host_ms"] for figure in found]
            table.add_row(
                name,
                arm,
                f"{statistics.median(host):.2f}",
                f"{min(host):.2f} to {max(host):.2f}",
                f"{statistics.median(host) / median(plain, 'host_ms'):.2f}",
                f"{median(found, 'total_ms'):.1f}",
                f"{median(found, 'total_ms') / median(plain, 'total_ms'):.2f}",
                f"{median(found, 'captures'):.0f}",
            )
        table.add_section()
    output = console()
    output.print(table)
    finish(output, options, "hpu", figures=figures)


if __name__ == "__main__":
    main()
