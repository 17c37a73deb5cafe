"""What the benchmarks share: what figures were measured with, the command line, and where results go."""

import argparse
import json
import logging
import os
import platform
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch
from rich.console import Console

T = TypeVar("T")

OFF = {"hpu_graphs": False, "async_copy": False, "pipelining": False}
"""The plugin in stock Lightning's order, without any of its techniques."""
BARE: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
"""Options of a Trainer that does nothing but predict."""
DEVICES = {"cpu": "CPU", "hpu": "emulated HPU (figures are not a Gaudi's)"}
LOAD = os.getloadavg()[0]  # before a benchmark adds its own


def about(*devices: str) -> dict[str, Any]:
    """Date, versions, machine and what else kept it busy, to stand beside the figures in a file."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": ", ".join(DEVICES[device] for device in devices),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        "load": LOAD,
    }


def parser(description: str | None, *, plot: bool = False) -> argparse.ArgumentParser:
    """A command line with `--json`, and with `--plot` if asked for."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    if plot:
        found.add_argument("--plot", type=Path, metavar="FILE", help="write a plot there (needs matplotlib)")
    return found


def quiet() -> None:
    """Silence what is said anew in each of many runs."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def console() -> Console:
    """Where tables go; in a file they are not folded."""
    found = Console()
    return found if found.is_terminal else Console(width=max(200, found.width))


def in_turn(arms: Sequence[T], number: int) -> list[T]:
    """The arms in the order of that round: none always comes after the same other one, or always last."""
    first = number % len(arms)
    return [*arms[first:], *arms[:first]]


def write_json(options: argparse.Namespace, *devices: str, **figures: Any) -> None:
    """Write the figures where `--json` says, with the options and what they were measured with."""
    if options.json is not None:
        # A path says nothing of the figures, but something of the machine.
        given = {name: value for name, value in vars(options).items() if not isinstance(value, Path | None)}
        options.json.write_text(json.dumps(about(*devices) | {"options": given} | figures, indent=1) + "\n")


def finish(output: Console, options: argparse.Namespace, *devices: str, **figures: Any) -> None:
    """End a benchmark whose arms' predictions were all compared."""
    output.print("predictions of all arms are equal")
    write_json(options, *devices, **figures)
