"""Depths that `pipelining="auto"` chooses against fixed ones, in the mixes of `benchmarks/bound.py`. All emulated.

    python -m benchmarks.auto [--batches 450] [--scale 2] [--mix MIX ...] [--json FILE]

What is shown is the steady state: the time between the ends of as many batches in every arm, without those that fill
and drain the pipeline. Those of "auto" come at the end of its run, when it has made its choice. All arms copy outputs
without waiting (`async_output=True`). Predictions of all arms are compared.
"""

import statistics
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.table import Table

from benchmarks.bound import Mix, device_of, lightnings, measure, mixes, parser_of_mixes, steady_ms
from benchmarks.common import console, finish, quiet
from lightning_hpu_infer.tuning import Depths, DepthTuner

FIXED = [Depths(2, 1), Depths(2, 2), Depths(4, 4), Depths(8, 8)]
WINDOW = 64
"""Batches that count."""
NEAR = 1.03
"""Times the best fixed arm's time: what "auto" may take."""


def drain(depths: Depths) -> int:
    """Batches that are left when the last one was prepared: those ready, those in flight, and the newest."""
    return depths.prefetch + depths.in_flight + 1


DRAIN = drain(max(FIXED))
FILL = 3 + 2 * DRAIN
"""The first three capture. What piles up meanwhile, at most as much as is drained at the end, is gone after twice as
many batches: other stages take at most half of the longest one's time, or all of it."""


class Choice(Callback):
    """Notes the tuner, and its depths at each batch's end."""

    tuner: DepthTuner

    def __init__(self) -> None:
        self.depths: list[Depths] = []

    def on_predict_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        loop: Any = trainer.predict_loop
        self.tuner = loop._tuner
        self.depths.append(self.tuner.depths)


def compare(mix: Mix, batches: int) -> dict[str, Any]:
    """Milliseconds per batch of every arm in one mix, and what "auto" ended with."""
    times = {}
    with device_of(mix):
        for depths in FIXED:
            run = lightnings({**depths._asdict(), "async_output": True})
            times["{}/{}".format(*depths)] = steady_ms(measure(run, mix, FILL + WINDOW + DRAIN), FILL, DRAIN)
        best, choice = min(times.values()), Choice()
        ends = measure(lightnings({"pipelining": "auto", "async_output": True}, [choice]), mix, batches)
    depths = choice.tuner.depths
    stop = batches - drain(depths)
    times["auto"] = steady_ms(ends, stop - WINDOW, drain(depths))
    settled = len(set(choice.depths[stop - WINDOW - FILL : stop])) == 1
    found = {"stages": mix._asdict(), "ms": times, "of_best": times["auto"] / best}
    return found | {"ended": depths._asdict(), "settled": settled, "log": choice.tuner.summary()}


def main() -> None:
    arguments = parser_of_mixes(__doc__, scale=2)
    arguments.add_argument("--batches", type=int, default=450, help=f'of "auto"; the last {WINDOW} or so count')
    options = arguments.parse_args()
    if options.batches < (least := FILL + WINDOW + DRAIN):
        arguments.error(f"--batches: at least {least}, got {options.batches}")
    quiet()
    output = console()
    table = Table("mix", "longest", title="emulated HPU: ms per batch (prefetch/in_flight)")
    for column in (*("{}/{}".format(*depths) for depths in FIXED), "auto", "auto / best fixed", "auto ended with"):
        table.add_column(column)
    found = {}
    for name, mix in mixes(options).items():
        found[name] = figures = compare(mix, options.batches)
        ended = "{prefetch}/{in_flight}".format(**figures["ended"]) + ("" if figures["settled"] else ", still trying")
        times = [f"{each:.1f}" for each in figures["ms"].values()]
        table.add_row(name, f"{max(mix):g}", *times, f"{figures['of_best']:.3f}", ended)
    output.print(table)
    ratios = [figures["of_best"] for figures in found.values()]
    near = sum(ratio <= NEAR for ratio in ratios)
    output.print(f"auto is within {NEAR - 1:.0%} of the best fixed setting in {near} of {len(ratios)} mixes")
    output.print(f"auto / best fixed: median {statistics.median(ratios):.3f}, worst {max(ratios):.3f}")
    finish(output, options, "hpu", results=found)


if __name__ == "__main__":
    main()
