"""Depths that `pipelining="auto"` chooses against fixed ones, in the mixes of `benchmarks/bound.py`. All emulated.

    python -m benchmarks.auto [--batches 320] [--scale 1] [--json FILE]

What is shown is the steady state: the time between the ends of the last batches, when "auto" has made its choice. All
arms copy outputs without waiting (`async_output=True`). Predictions of all arms are compared.
"""

import argparse
import json
import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bound import FLOATS, MIXES, Mix, lightnings
from benchmarks.environment import about
from lightning_hpu_infer import emulator

FIXED = {"2/1": (2, 1), "2/2": (2, 2), "4/4": (4, 4), "8/8": (8, 8)}
LAST = 64
"""Batches that count."""


def install(mix: Mix) -> None:
    """An emulated device on which a batch takes these times."""
    emulator.uninstall()
    gigabytes = 4 * FLOATS / 1e9
    emulator.install(
        emulator.EmulatorConfig(
            program_ms=mix.compute,
            h2d_gbps=1e3 * gigabytes / mix.copy_in,
            d2h_gbps=1e3 * gigabytes / mix.copy_out,
        )
    )


def steady_ms(ends: list[float]) -> float:
    """Milliseconds per batch over the last ones, without the two that only drain."""
    return 1e3 * (ends[-3] - ends[-LAST]) / (LAST - 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=320)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    table = Table("mix", "longest", *FIXED, "auto", "auto / best fixed", title="emulated HPU: ms per batch")
    found: dict[str, Any] = {}
    for name, mix in MIXES.items():
        scaled = Mix(*(options.scale * each for each in mix))
        install(scaled)
        figures: dict[str, float] = {}
        expected: Any = None
        for arm, (prefetch, in_flight) in FIXED.items():
            run = lightnings({"prefetch": prefetch, "in_flight": in_flight, "async_output": True})
            _, ends = run(scaled, LAST + 36)
            figures[arm] = steady_ms(ends)
        for flags in ({"async_output": True}, {"async_output": True, "pipelining": "auto"}):
            batches = options.batches if "pipelining" in flags else LAST
            predictions, ends = lightnings(flags)(scaled, batches)
            expected = expected or predictions
            torch.testing.assert_close(predictions[:LAST], expected[:LAST])
        figures["auto"] = steady_ms(ends)
        found[name] = figures
        # What a backlog seems to gain below the longest stage is no steady state.
        best = max(max(scaled), min(figures[arm] for arm in FIXED))
        figures["best"] = best
        cells = [f"{figures[arm]:.1f}" for arm in (*FIXED, "auto")]
        table.add_row(name, f"{max(scaled):g}", *cells, f"{figures['auto'] / best:.2f}")
    emulator.uninstall()
    Console(width=120).print(table)
    ratios = [figures["auto"] / figures["best"] for figures in found.values()]
    Console().print(f"auto / best fixed: median {statistics.median(ratios):.3f}, worst {max(ratios):.3f}")
    Console().print("predictions of all arms are equal")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(about(emulated=True) | {"options": vars(options), "ms_per_batch": found}, file, indent=1)


if __name__ == "__main__":
    main()
