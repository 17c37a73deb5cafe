"""What the examples share: each technique beside stock Lightning, timed, with equal results."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator

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


def predict(accelerator: Accelerator | str, module: LightningModule, loader: DataLoader[Any]) -> list[Any]:
    """What `trainer.predict` returns."""
    trainer = Trainer(accelerator=accelerator, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    predictions = trainer.predict(module, loader)
    assert predictions is not None
    return predictions


def compare(
    amount: float,
    unit: str,
    run: Callable[[Accelerator | str], Result],
    check: Callable[[Result, Result], None],
    techniques: dict[str, dict[str, Any]] = TECHNIQUES,
) -> Result:
    """Run stock Lightning on the CPU, then each technique, and print a table of times and counters.

    The techniques run on an HPU if there is one, on the emulated HPU if `LIGHTNING_HPU_INFER_EMULATOR=1` is set, and on
    the CPU otherwise.

    Args:
        amount: How much is predicted.
        unit: Of what.
        run: Predicts with an accelerator, as `predict` does.
        check: Is called with a technique's result and stock Lightning's, and raises if they differ.
        techniques: Flags of `HPUInferenceAccelerator` by name.

    Returns:
        Stock Lightning's result.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    emulated, console = emulator.is_installed(), Console()
    device = (
        "the emulated HPU: these times are not a Gaudi's" if emulated else "an HPU if there is one, else on the CPU"
    )
    console.print(f"{amount:.10g} {unit}, on {device}", highlight=False)
    table = Table("technique")
    for column in ("seconds", f"{unit} / s", *(("captures", "replays", "pinned copies") if emulated else ())):
        table.add_column(column, justify="right")
    start = time.perf_counter()
    expected = run("cpu")
    seconds = time.perf_counter() - start
    table.add_row("stock Lightning, CPU", f"{seconds:.2f}", f"{amount / seconds:.1f}")
    for name, flags in techniques.items():
        if emulated:
            emulator.reset_stats()
        start = time.perf_counter()
        result = run(HPUInferenceAccelerator(**flags))
        seconds = time.perf_counter() - start
        row = [name, f"{seconds:.2f}", f"{amount / seconds:.1f}"]
        check(result, expected)
        if emulated:
            stats = emulator.stats()
            row += [str(stats.captures), str(stats.replays), str(stats.h2d_pinned)]
        table.add_row(*row)
    console.print(table)
    console.print("all results agree with stock Lightning's")
    return expected
