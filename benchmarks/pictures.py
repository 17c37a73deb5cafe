"""The pictures of docs/overhead.md: one technique after the other on an emulated HPU. No figure is a Gaudi's.

    python -m benchmarks.pictures [--folder docs/images] [--page docs/overhead.md] [--rounds 7] [--sentences 320]
                                  [--json FILE]

Words are tagged as in the second part of `examples/demo.py`: small batches, so that a batch costs the host as much as
the device, which takes a set time for it and leaves the processor to the host. Predictions of all runs are compared
first; then arms take turns, and last each is recorded for its picture. `--page` writes the figures into the table of a
page.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.table import Table

from benchmarks.common import BARE, OFF, console, finish, in_turn, parser, quiet
from examples.demo import DEVICE_MS, Tagger, tagging
from examples.embed_sentences import sentences_of
from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.observe.report import Report

STEPS: dict[str, dict[str, Any]] = {
    "1-stock-order": OFF,
    "2-graphs": OFF | {"hpu_graphs": "hpu_graph"},
    "3-async-copies": OFF | {"hpu_graphs": "hpu_graph", "async_copy": True},
    "4-pipelining": {"hpu_graphs": "hpu_graph"},
}
START, END = "<!-- figures: python -m benchmarks.pictures writes them -->", "<!-- end of figures -->"


def timed(trainers: dict[str, Trainer], model: Tagger, loader: Any, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per batch of each arm, round by round. Raises if any arm's predictions differ."""
    expected: Any = None
    for trainer in trainers.values():  # finds its graphs in the next run, as the later batches of a long run do
        predictions: Any = trainer.predict(model, loader)
        expected = expected or predictions
        assert predictions == expected
    found: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(rounds):
        for name in in_turn(list(trainers), number):
            start = time.perf_counter()
            trainers[name].predict(model, loader)
            found[name].append(1e3 * (time.perf_counter() - start) / len(expected))
    return found


def recorded(flags: dict[str, Any], model: Tagger, loader: Any, picture: Path) -> Report:
    """The report of a run, whose timeline becomes a picture."""
    with tempfile.TemporaryDirectory() as folder:
        accelerator = HPUInferenceAccelerator(trace=folder, **flags)
        # With the bar, as in most users' runs.
        trainer = Trainer(accelerator=accelerator, **BARE | {"enable_progress_bar": True})
        for _ in range(2):
            trainer.predict(model, loader)
        shutil.copy(Path(folder) / "timeline.png", picture)
    assert isinstance(accelerator.report, Report)
    return accelerator.report


def row_of(name: str, times: list[float], busy: float) -> list[str]:
    """An arm's figures in words."""
    spread = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
    return [name[2:].replace("-", " "), spread, f"{busy:.0%}"]


def written(page: str, rows: list[list[str]]) -> str:
    """A page with these figures in its table."""
    before, _, rest = page.partition(START)
    table = ["| after | ms per batch: median (least to most) | device busy |", "| --- | --- | --- |"]
    lines = "\n".join([*table, *(f"| {' | '.join(row)} |" for row in rows)])
    return f"{before}{START}\n\n{lines}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, default=Path("docs/images"))
    arguments.add_argument("--page", type=Path, help="write the figures into this page")
    for name, default in (("rounds", 7), ("sentences", 320)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    options = arguments.parse_args()
    quiet()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    emulator.install(emulator.EmulatorConfig(program_ms=DEVICE_MS))
    sentences = sentences_of("\n\n".join(topics.values()))[: options.sentences]
    model, loader, decode = tagging(sentences)
    # In place, or by threads where the loop is pipelined.
    steps = {name: flags | {"postprocess": decode} for name, flags in STEPS.items()}
    trainers = {name: Trainer(accelerator=HPUInferenceAccelerator(**flags), **BARE) for name, flags in steps.items()}
    times = timed(trainers, model, loader, options.rounds)
    reports = {name: recorded(flags, model, loader, options.folder / f"{name}.png") for name, flags in steps.items()}
    title = f"emulated HPU (figures are not a Gaudi's): {DEVICE_MS:g} ms of device time per batch"
    table = Table("run", "ms per batch", "device busy", "verdict", "next", title=title)
    rows = []
    for name, report in reports.items():
        rows.append(row_of(name, times[name], report.efficiency or 0.0))
        table.add_row(*rows[-1], report.verdict.value, report.advice)
    output = console()
    output.print(table)
    if options.page is not None:
        options.page.write_text(written(options.page.read_text(), rows))
    figures = {name: {"ms": times[name], "report": json.loads(each.to_json())} for name, each in reports.items()}
    finish(output, options, "hpu", steps=figures)


if __name__ == "__main__":
    main()
