"""The pictures of docs/overhead.md: the demo's model, one technique after the other. All figures are emulated.

    python -m benchmarks.pictures [--folder docs/images] [--sentences 160] [--batch-size 4] [--length 24] [--json FILE]

Short sentences in small batches, as in Intel's guide: there a batch costs the host as much as the device. Embeddings of
all runs are compared first.
"""

import json
import shutil
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.table import Table

from benchmarks.common import BARE, OFF, console, finish, parser, quiet
from examples.embed_sentences import SentenceEmbedder, loader_of, sentences_of
from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.observe.report import Report

STEPS: dict[str, dict[str, Any]] = {
    "1-stock-order": OFF,
    "2-graphs": OFF | {"hpu_graphs": "hpu_graph"},
    "3-async-copies": OFF | {"hpu_graphs": "hpu_graph", "async_copy": True},
    "4-pipelining": {"hpu_graphs": "hpu_graph"},
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, default=Path("docs/images"))
    for name, default in (("sentences", 160), ("batch-size", 4), ("length", 24)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    options = arguments.parse_args()
    quiet()
    options.folder.mkdir(parents=True, exist_ok=True)
    # One thread computes, as one device would: the other core is the host's.
    torch.set_num_threads(1)
    emulator.install()
    sentences = sentences_of("\n\n".join(topics.values()))[: options.sentences]
    model, loader = SentenceEmbedder(), loader_of(sentences, options.batch_size, options.length)
    table = Table(
        "run", "batches/s", "device busy", "verdict", "next", title="emulated HPU (figures are not a Gaudi's)"
    )
    expected: Any = None
    found: dict[str, Any] = {}
    for name, flags in STEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            accelerator = HPUInferenceAccelerator(trace=folder, **flags)
            # With the bar, as in most users' runs.
            trainer = Trainer(accelerator=accelerator, **BARE | {"enable_progress_bar": True})
            # Twice: the second run finds its graphs, as the later batches of a long run do.
            predictions: Any = [trainer.predict(model, loader) for _ in range(2)][-1]
            expected = expected or predictions
            torch.testing.assert_close(predictions, expected, rtol=1e-3, atol=1e-4)
            shutil.copy(Path(folder) / "timeline.png", options.folder / f"{name}.png")
        assert isinstance(accelerator.report, Report)
        report = accelerator.report
        found[name] = json.loads(report.to_json())
        table.add_row(name, f"{report.throughput:.1f}", f"{report.efficiency:.0%}", report.verdict.value, report.advice)
    output = console()
    output.print(table)
    finish(output, options, "hpu", reports=found)


if __name__ == "__main__":
    main()
