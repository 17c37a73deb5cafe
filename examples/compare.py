"""What the examples share: each technique beside stock Lightning, timed, with equal results."""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from rich.console import Console
from rich.table import Column, Table
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.devices import select_device

Result = TypeVar("Result")
OFF: dict[str, Any] = {"hpu_graphs": False, "async_copy": False, "pipelining": False}
# By name: True would leave out runs as short as these, which do not win back what tracing costs.
GRAPHS: dict[str, Any] = {"hpu_graphs": "hpu_graph"}
TECHNIQUES: dict[str, dict[str, Any]] = {
    "stock order": OFF,
    "graphs": OFF | GRAPHS,
    "async copies": OFF | {"async_copy": True},
    "pipelining": OFF | {"pipelining": True},
    "all together": GRAPHS,
}
"""Flags of `HPUInferenceAccelerator`: each technique alone, and all."""
NOTHING_ON_CPU = {"graphs", "async copies", "pipelining"}
"""Techniques that by themselves do nothing on the CPU."""
RUNS = 5
"""At most, until one captures nothing anymore."""
console = Console()
SAID_ELSEWHERE = (
    "No HPU was found",  # the first line of the output names the device
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
    r"Dynamo detected a call to a `functools\.lru_cache`",  # in transformers
    "The 'predict_dataloader' does not have many workers",
)
"""Beginnings of warnings that say nothing to whom runs an example."""


@contextmanager
def needs(extras: str, module: str) -> Iterator[None]:
    """Around imports of what extras install: says in one line how to install it, and ends what was started as a script.

    Args:
        extras: As pip names them.
        module: The `__name__` of the example, which may be imported as well.

    Raises:
        ModuleNotFoundError: Where it is imported, and something is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if module != "__main__":
            raise
        print(f"{error}: pip install '.[{extras}]'", file=sys.stderr)
        sys.exit(2)


def quiet() -> None:
    """Leave out what Lightning says anew for each of many Trainers, and `SAID_ELSEWHERE`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for beginning in SAID_ELSEWHERE:
        warnings.filterwarnings("ignore", beginning)


def positive(text: str) -> int:
    """A command line's number of things, of which there is at least one."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def existing(text: str) -> Path:
    """A command line's file or folder that is there."""
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is no {text}")
    return Path(text)


def trainer_of(accelerator: Accelerator | str) -> Trainer:
    """A Trainer that does nothing but predict."""
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return Trainer(accelerator=accelerator, enable_progress_bar=False, **options)


def predict(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> list[Any]:
    """What `trainer.predict` returns."""
    predictions = trainer.predict(module, loader)
    assert predictions is not None
    return predictions


def device() -> str:
    """Where the plugin predicts here."""
    if emulator.is_installed():
        return "an emulated HPU, whose times are not a Gaudi's"
    if select_device().type == "hpu":
        return "the HPU"
    return "the CPU: no HPU was found, and LIGHTNING_HPU_INFER_EMULATOR=1 emulates one"


def compare(
    amount: float,
    unit: str,
    run: Callable[[Trainer], Result],
    check: Callable[[Result, Result], None],
    techniques: dict[str, dict[str, Any]] = TECHNIQUES,
) -> Result:
    """Run stock Lightning on the CPU, then each technique, and print a table of times and counters.

    The techniques run on an HPU if there is one, on the emulated HPU if `LIGHTNING_HPU_INFER_EMULATOR=1` is set, and on
    the CPU otherwise, which leaves out `NOTHING_ON_CPU`. Each Trainer predicts once to warm up, and again until nothing
    is traced and captured anymore; that last run is what counts.

    Args:
        amount: How much is predicted.
        unit: Of what.
        run: Predicts with a Trainer, as `predict` does.
        check: Is called with a technique's result and stock Lightning's, and raises if they differ.
        techniques: Flags of `HPUInferenceAccelerator` by name.

    Returns:
        Stock Lightning's result.
    """
    quiet()
    emulated = emulator.is_installed()
    counted = ("captures", "replays", "pinned copies") if emulated else ()
    if select_device().type == "cpu":
        techniques = {name: flags for name, flags in techniques.items() if name not in NOTHING_ON_CPU}
    console.print(f"{amount:.10g} {unit}: stock Lightning on the CPU, the plugin on {device()}", highlight=False)
    table = Table(Column("technique", no_wrap=True))
    for column in ("first, s", "then, s", "per second", *counted):
        table.add_column(column, justify="right")
    with console.status("stock Lightning"):
        expected, seconds = timed(run, trainer_of("cpu"))
    table.add_row("stock Lightning", *cells(seconds, amount))
    plain = []
    for name, flags in techniques.items():
        if emulated:
            emulator.reset_stats()
        with console.status(name):
            result, seconds = timed(run, trainer_of(HPUInferenceAccelerator(**flags)))
        check(result, expected)
        row = cells(seconds, amount)
        if emulated:
            stats = emulator.stats()
            row += [str(stats.captures), str(stats.replays), str(stats.h2d_pinned)]
            plain += [name] if flags.get("hpu_graphs", True) and not stats.captures else []
        table.add_row(name, *row)
    console.print(table)
    console.print("all results agree with stock Lightning's")
    if plain:
        console.print(f"nothing was captured in {' and '.join(plain)}: no shape came again often enough")
    return expected


def timed(run: Callable[[Trainer], Result], trainer: Trainer) -> tuple[Result, list[float]]:
    """What the last run gave, and the seconds of each run."""
    seconds: list[float] = []
    captures = -1
    while len(seconds) < 2 or (len(seconds) < RUNS and captures < counted_captures()):
        captures, start = counted_captures(), time.perf_counter()
        result = run(trainer)
        seconds.append(time.perf_counter() - start)
    return result, seconds


def counted_captures() -> int:
    return emulator.stats().captures if emulator.is_installed() else 0


def cells(seconds: list[float], amount: float) -> list[str]:
    """Of the table: the last run is by itself."""
    return [f"{sum(seconds[:-1]):.2f}", f"{seconds[-1]:.2f}", f"{amount / seconds[-1]:.1f}"]
