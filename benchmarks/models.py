"""Which models get graphs: all of `model_zoo/`, equal to stock Lightning. Emulated, and counts only: no times.

    python -m benchmarks.models [--eager] [--json FILE] [NAME ...]

Each model is run as a user writes it, on eight batches of one shape: the first runs plainly, the second is traced and
captured. Per model: graphs traced and captured, replays, calls without a graph, and programs of the device per batch,
without graphs and with them (a replay, and the copies that make its results the caller's).
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.table import Table
from torch.utils.data import DataLoader

from benchmarks.common import BARE, OFF, console, finish, parser, quiet
from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from model_zoo import GENERATION, ZOO, Entry


class Programs(Callback):
    """Programs that the device had run at the end of each batch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_predict_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.seen.append(emulator.stats().programs)


@dataclass
class Row:
    """What one model did."""

    name: str
    verdict: str
    plain_programs: int = 0
    programs: int = 0
    counts: dict[str, Any] = field(default_factory=dict)


def predict(accelerator: Any, entry: Entry, programs: Programs) -> tuple[Any, Trainer]:
    module, batches = entry.make()
    trainer = Trainer(accelerator=accelerator, callbacks=[programs], **BARE)
    return trainer.predict(module, DataLoader(batches, batch_size=None)), trainer  # type: ignore[arg-type]


def row_of(entry: Entry, lazy: bool) -> Row:
    """Run a model on stock Lightning, plainly on the device, and with graphs."""
    module, batches = entry.make()
    expected: Any = Trainer(accelerator="cpu", **BARE).predict(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    emulator.install(emulator.EmulatorConfig(lazy=lazy))
    try:
        plain, graphed = Programs(), Programs()
        off: dict[str, Any] = OFF
        predict(HPUInferenceAccelerator(**off), entry, plain)
        asked: Any = "hpu_graph" if lazy else "compile"
        flags: dict[str, Any] = OFF | {"hpu_graphs": asked}
        actual, trainer = predict(HPUInferenceAccelerator(**flags), entry, graphed)
        loop: Any = trainer.predict_loop
        counts = vars(loop.graph_counts)
    finally:
        emulator.uninstall()
    try:
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
        verdict = "equal"
    except AssertionError as error:
        verdict = f"WRONG: {error}"
    before, after = (each.seen[-1] - each.seen[-2] for each in (plain, graphed))
    # Without the line, whose path says something of the machine and nothing of the model.
    reasons = {reason.split(", at ")[0]: times for reason, times in counts["reasons"].items()}
    return Row(entry.name, verdict, before, after, counts | {"reasons": reasons})


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--eager", action="store_true", help="eager mode: `hpu_backend` in place of HPU graphs")
    arguments.add_argument("names", nargs="*", metavar="NAME")
    options = arguments.parse_args()
    quiet()
    torch.set_num_threads(1)
    entries = ZOO | GENERATION
    output = console()
    columns = (
        "model",
        "to stock",
        "traced",
        "captured",
        "replays",
        "plain calls",
        "programs/batch plain",
        "with graphs",
    )
    table = Table(*columns, title=f"emulated HPU, {'eager' if options.eager else 'lazy'} mode (counts, no times)")
    rows = []
    for name in options.names or entries:
        with warnings.catch_warnings():
            row = row_of(entries[name], lazy=not options.eager)
        rows.append(row)
        numbers = [row.counts[each] for each in ("traces", "captures", "replays", "plain_calls")]
        table.add_row(name, row.verdict, *map(str, (*numbers, row.plain_programs, row.programs)))
    output.print(table)
    one = sum(row.counts["traces"] == row.counts["captures"] == 1 for row in rows)
    some = sum(row.counts["replays"] > 0 for row in rows)
    output.print(f"{len(rows)} models: {one} with one graph for the whole step, {some} with replays")
    assert all(row.verdict == "equal" for row in rows), [row.verdict for row in rows if row.verdict != "equal"]
    finish(output, options, "hpu", figures={row.name: vars(row) for row in rows})


if __name__ == "__main__":
    main()
