"""The pipeline against its bound, the longest stage, on an emulated HPU. Figures are emulated, not a Gaudi's.

    python benchmarks/bound.py [--batches 44] [--rounds 1] [--scale 2] [--json FILE] [--plot FILE]

Each batch takes five stages of chosen times: prepare (in the dataset), copy in, compute, copy out, and finish (in
`on_predict_batch_end`). A perfect pipeline takes the longest of them per batch, one after the other takes their sum.
What is shown is the steady state: the time between the ends of batches, without those that fill and drain the pipeline.
Predictions of all arms are compared.
"""

import argparse
import inspect
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer import HPUInferenceAccelerator, emulator

FLOATS = 16384
OFF = {"hpu_graphs": False, "async_copy": False, "pipelining": False}
FILL, DRAIN = 22, 6
IN_ORDER = ("stock", "guide")
"""Arms without a backlog: they run half of the batches, and half as many do not count."""
"""Batches at both ends of a run that do not count: a backlog from the captures takes a while to vanish."""
BOUND = 1.05
STOCK_WITH_WORKERS = "stock, 2 workers, pinned"


class Mix(NamedTuple):
    """Milliseconds of each stage."""

    prepare: float
    copy_in: float
    compute: float
    copy_out: float
    finish: float


MIXES = {  # times `--scale`
    "device-bound": Mix(10, 10, 25, 10, 10),
    "input-bound": Mix(25, 10, 10, 10, 10),
    "copy in": Mix(10, 25, 10, 10, 10),
    "copy out": Mix(10, 10, 10, 25, 10),
    "post-processing": Mix(10, 10, 10, 10, 25),
    "device and input": Mix(20, 10, 20, 10, 10),
    "input and post-processing": Mix(20, 10, 10, 10, 20),
    "device and copy out": Mix(10, 10, 20, 20, 10),
    "copy out and post-processing": Mix(10, 10, 10, 20, 20),
    "all equal": Mix(15, 15, 15, 15, 15),
}


class Prepared(Dataset[Tensor]):
    """Rows that take host time to prepare."""

    def __init__(self, length: int, milliseconds: float) -> None:
        self.rows = torch.randn(length, FLOATS, generator=torch.Generator().manual_seed(0))
        self.milliseconds = milliseconds

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(self.milliseconds / 1e3)
        return self.rows[index]


class Scale(nn.Module):
    """As many outputs as inputs; how long it takes is the emulator's setting."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    def forward(self, batch: Tensor) -> Tensor:
        return batch * self.factor


class Net(LightningModule):
    """One network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Scale()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)


class Finish(Callback):
    """Host work on each output; notes when it was done."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.ends: list[float] = []

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        time.sleep(self.milliseconds / 1e3)
        self.ends.append(time.perf_counter())


Run = Callable[[Mix, int], tuple[list[Tensor], list[float]]]
"""Predictions of so many batches, and when each was finished."""


def lightnings(flags: dict[str, Any], **loader_options: Any) -> Run:
    def run(mix: Mix, batches: int) -> tuple[list[Tensor], list[float]]:
        finish = Finish(mix.finish)
        trainer = Trainer(
            accelerator=HPUInferenceAccelerator(**flags),
            callbacks=[finish],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        predictions: Any = trainer.predict(Net(), DataLoader(Prepared(batches, mix.prepare), **loader_options))
        return predictions, finish.ends

    return run


@torch.inference_mode()
def by_hand(mix: Mix, batches: int) -> tuple[list[Tensor], list[float]]:
    """The pipelined loop of Intel's guide, with graphs and copies that do not wait; preparation is not in a thread."""
    import habana_frameworks.torch.core as htcore
    import habana_frameworks.torch.hpu as hpu

    model = hpu.wrap_in_hpu_graph(Scale().eval().to("hpu"), disable_tensor_cache=True)
    finish, outputs = Finish(mix.finish), []
    queries = iter(DataLoader(Prepared(batches, mix.prepare)))
    query = next(queries, None)
    while query is not None:
        output_hpu = model(query.pin_memory("hpu").to("hpu", non_blocking=True))
        htcore.mark_step()
        query = next(queries, None)
        outputs.append(output_hpu.to("cpu"))
        finish.on_predict_batch_end()
    return outputs, finish.ends


def arms() -> dict[str, Run]:
    found: dict[str, Run] = {
        "stock order": lightnings(OFF),
        STOCK_WITH_WORKERS: lightnings(OFF, num_workers=2, pin_memory=True),
        "guide's loop": by_hand,
        "defaults": lightnings({}),
        "in_flight=4": lightnings({"in_flight": 4}),
    }
    if "async_output" in inspect.signature(HPUInferenceAccelerator).parameters:
        found["in_flight=4, async_output"] = lightnings({"in_flight": 4, "async_output": True})
    return found


def measure(mix: Mix, options: argparse.Namespace, console: Console, wanted: dict[str, Run]) -> dict[str, float]:
    """Milliseconds per batch of every arm in one mix. Raises if any arm's predictions differ."""
    nbytes = 4 * FLOATS
    found: dict[str, list[float]] = {}
    expected = Prepared(options.batches, 0).rows[:, None] * 1.5
    emulator.install(
        emulator.EmulatorConfig(
            program_ms=mix.compute, h2d_gbps=nbytes / mix.copy_in / 1e6, d2h_gbps=nbytes / mix.copy_out / 1e6
        )
    )
    try:
        for _ in range(options.rounds):
            for arm, run in list(wanted.items()):
                part = 2 if arm.startswith(IN_ORDER) else 1
                batches, fill = options.batches // part, FILL // part
                try:
                    predictions, ends = run(mix, batches)
                except RuntimeError as error:
                    if arm != STOCK_WITH_WORKERS:
                        raise
                    console.print(f"left out: {arm}: {error}")
                    del wanted[arm]
                    continue
                torch.testing.assert_close(torch.stack(predictions), expected[:batches])
                steady = ends[fill : batches - DRAIN]
                found.setdefault(arm, []).append((steady[-1] - steady[0]) / (len(steady) - 1) * 1e3)
    finally:
        emulator.uninstall()
    return {arm: statistics.median(times) for arm, times in found.items()}


def show(results: dict[str, tuple[Mix, dict[str, float]]], console: Console) -> None:
    names = list(dict.fromkeys(arm for _, times in results.values() for arm in times))
    table = Table("mix", "stages, ms", "longest", *names, title="emulated HPU: ms per batch (of the longest stage)")
    for name, (mix, times) in results.items():
        cells = []
        for arm in names:
            ratio = times[arm] / max(mix) if arm in times else None
            mark = "" if ratio is None or arm.startswith(IN_ORDER) else "[green]" if ratio <= BOUND else "[red]"
            cells.append("" if ratio is None else f"{mark}{times[arm]:.1f} ({ratio:.2f})")
        table.add_row(name, " ".join(f"{stage:g}" for stage in mix), f"{max(mix):g}", *cells)
    console.print(table)
    for arm in names:
        within = sum(times[arm] <= BOUND * max(mix) for mix, times in results.values() if arm in times)
        console.print(f"{arm}: {within} of {len(results)} mixes within {BOUND} of the longest stage", highlight=False)


def plot(results: dict[str, tuple[Mix, dict[str, float]]], path: str) -> None:
    """Time per batch of every arm, as a multiple of the longest stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(arm for _, times in results.values() for arm in times))
    figure, axis = pyplot.subplots(figsize=(1.2 * len(results) + 2, 4.2))
    width = 0.8 / len(names)
    for number, arm in enumerate(names):
        at = [place + (number - (len(names) - 1) / 2) * width for place in range(len(results))]
        heights = [times.get(arm, 0) / max(mix) for mix, times in results.values()]
        axis.bar(at, heights, width, label=arm, color=f"C{number}")
    axis.axhline(1, color="black", lw=0.8)
    labels = [f"{name}\n{'/'.join(f'{stage:g}' for stage in mix)}" for name, (mix, _) in results.items()]
    axis.set_xticks(range(len(results)), labels, fontsize=7, rotation=20)
    axis.set_ylabel("time per batch / longest stage")
    axis.set_title("emulated HPU, stages: prepare / copy in / compute / copy out / finish, ms", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=44, help=f"{FILL + DRAIN} of them do not count")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--scale", type=float, default=2, help="times the stages' times; the emulator's own take 1 to 2 ms"
    )
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES), metavar="MIX")
    parser.add_argument("--ours", action="store_true", help="leave out stock Lightning and the guide's loop")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="write a plot there (needs matplotlib)")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    console = Console()
    wanted = {name: run for name, run in arms().items() if not (options.ours and name.startswith(IN_ORDER))}
    results = {}
    for name in options.mix:
        mix = Mix(*(options.scale * stage for stage in MIXES[name]))
        results[name] = mix, measure(mix, options, console, wanted)
    show(results, console)
    console.print("predictions of all arms are equal")
    if options.json:
        found = [{"mix": name, "stages": mix._asdict(), "ms": times} for name, (mix, times) in results.items()]
        Path(options.json).write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
