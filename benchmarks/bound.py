"""The pipeline against its bound, the longest stage, on an emulated HPU. Figures are emulated, not a Gaudi's.

    python -m benchmarks.bound [--batches 120] [--rounds 1] [--scale 4] [--unseen N [--seed S]] [--json FILE]

Each batch takes five stages of chosen times: prepare (in the dataset), copy in, compute, copy out, and finish (host
work on the output: in `write_on_batch_end` of a `BasePredictionWriter`, in `postprocess`, or in the end hook of any
callback, which runs in stock order). A perfect pipeline takes the longest of them per batch, one after the other takes
their sum. What is shown is the steady state: the time between the ends of batches, without those that fill and drain
the pipeline and those in which the depths are chosen. Predictions of all arms are compared.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import BARE, OFF, console, finish, parser, quiet
from lightning_hpu_infer import HPUInferenceAccelerator, emulator

FLOATS = 16384
FILL, DRAIN = 78, 18
"""Batches at both ends of a run that do not count: a backlog from the captures takes a while to vanish, and so do the
windows in which the pipeline tries greater depths."""
IN_ORDER = ("stock", "guide", "any end hook")
"""Arms without a backlog: they run a fifth of the batches, and a fifth as many do not count."""
BOUND = 1.05
UNSEEN_MS = 12, 84
"""Between which times the stages of `--unseen` mixes are drawn."""


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
    """Host work on each output in an end hook of the user's; notes when it was done."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.ends: list[float] = []

    def on_predict_batch_end(self, *_: Any, **__: Any) -> None:
        time.sleep(self.milliseconds / 1e3)
        self.ends.append(time.perf_counter())


class Write(BasePredictionWriter):
    """The same in a writer, in the main thread."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__("batch")
        self.milliseconds = milliseconds
        self.ends: list[float] = []

    def write_on_batch_end(self, *_: Any, **__: Any) -> None:
        time.sleep(self.milliseconds / 1e3)
        self.ends.append(time.perf_counter())


class Sleep:
    """The same as `postprocess`."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds

    def __call__(self, output: Tensor) -> Tensor:
        time.sleep(self.milliseconds / 1e3)
        return output


Run = Callable[[Mix, int], tuple[list[Tensor], list[float]]]
"""Predictions of so many batches, and when each was finished."""


def lightnings(
    flags: dict[str, Any],
    callbacks: Sequence[Callback] = (),
    ends: type[Finish] | type[Write] = Write,
    postprocess: bool = False,
    **loader_options: Any,
) -> Run:
    """Predict with these flags; each output's host work is done in `ends`, or in `postprocess` if asked for."""

    def run(mix: Mix, batches: int) -> tuple[list[Tensor], list[float]]:
        last = ends(0 if postprocess else mix.finish)
        given = flags | {"postprocess": Sleep(mix.finish)} if postprocess else flags
        accelerator = HPUInferenceAccelerator(**given)
        trainer = Trainer(accelerator=accelerator, callbacks=[*callbacks, last], **BARE)
        predictions: Any = trainer.predict(Net(), DataLoader(Prepared(batches, mix.prepare), **loader_options))
        return predictions, last.ends

    return run


@torch.inference_mode()
def by_hand(mix: Mix, batches: int) -> tuple[list[Tensor], list[float]]:
    """The pipelined loop of Intel's guide, with graphs and copies that do not wait; preparation is not in a thread."""
    import habana_frameworks.torch.core as htcore
    import habana_frameworks.torch.hpu as hpu

    model = hpu.wrap_in_hpu_graph(Scale().eval().to("hpu"), disable_tensor_cache=True)
    last, outputs = Finish(mix.finish), []
    queries = iter(DataLoader(Prepared(batches, mix.prepare)))
    query = next(queries, None)
    while query is not None:
        output_hpu = model(query.pin_memory("hpu").to("hpu", non_blocking=True))
        htcore.mark_step()
        query = next(queries, None)
        outputs.append(output_hpu.to("cpu"))
        last.on_predict_batch_end()
    return outputs, last.ends


def arms() -> dict[str, Run]:
    return {
        "stock order": lightnings(OFF),
        "stock, 2 workers, pinned": lightnings(OFF, num_workers=2, pin_memory=True),
        "guide's loop": by_hand,
        "any end hook": lightnings({}, ends=Finish),
        "defaults, writer": lightnings({}),
        "defaults, postprocess": lightnings({}, postprocess=True),
    }


@contextmanager
def device_of(mix: Mix) -> Iterator[None]:
    """An emulated device on which a batch takes these times."""
    nbytes = 4 * FLOATS
    config = emulator.EmulatorConfig(
        program_ms=mix.compute, h2d_gbps=nbytes / mix.copy_in / 1e6, d2h_gbps=nbytes / mix.copy_out / 1e6
    )
    emulator.install(config)
    try:
        yield
    finally:
        emulator.uninstall()


def measure(run: Run, mix: Mix, batches: int) -> list[float]:
    """When each batch was finished. Raises if predictions are not those of a plain computation."""
    predictions, ends = run(mix, batches)
    torch.testing.assert_close(torch.stack(predictions), Prepared(batches, 0).rows[:, None] * 1.5)
    return ends


def steady_ms(ends: list[float], fill: int, drain: int) -> float:
    """Milliseconds per batch, without those that fill and drain the pipeline."""
    steady = ends[fill : len(ends) - drain]
    return 1e3 * (steady[-1] - steady[0]) / (len(steady) - 1)


def measure_all(mix: Mix, batches: int, rounds: int, wanted: dict[str, Run]) -> dict[str, float]:
    """Milliseconds per batch of every arm in one mix."""
    found: dict[str, list[float]] = {arm: [] for arm in wanted}
    with device_of(mix):
        for _ in range(rounds):
            for arm, run in wanted.items():
                part = 5 if arm.startswith(IN_ORDER) else 1
                found[arm].append(steady_ms(measure(run, mix, batches // part), FILL // part, DRAIN // part))
    return {arm: statistics.median(times) for arm, times in found.items()}


def show(results: dict[str, tuple[Mix, dict[str, float]]], output: Console) -> None:
    names = list(next(iter(results.values()))[1])
    table = Table("mix", "stages, ms", "longest", *names, title="emulated HPU: ms per batch (of the longest stage)")
    for name, (mix, times) in results.items():
        cells = []
        for arm in names:
            ratio = times[arm] / max(mix)
            mark = "" if arm.startswith(IN_ORDER) else "[green]" if ratio <= BOUND else "[red]"
            cells.append(f"{mark}{times[arm]:.1f} ({ratio:.2f})")
        table.add_row(name, " ".join(f"{stage:g}" for stage in mix), f"{max(mix):g}", *cells)
    output.print(table)
    for arm in names:
        within = sum(times[arm] <= BOUND * max(mix) for mix, times in results.values())
        output.print(f"{arm}: {within} of {len(results)} mixes within {BOUND} of the longest stage", highlight=False)


def plot(results: dict[str, tuple[Mix, dict[str, float]]], path: Path) -> None:
    """Time per batch of every arm, as a multiple of the longest stage."""
    from matplotlib.figure import Figure

    names = list(next(iter(results.values()))[1])
    figure = Figure(figsize=(1.2 * len(results) + 2, 4.2), layout="tight")
    axis = figure.subplots()
    width = 0.8 / len(names)
    for number, arm in enumerate(names):
        at = [place + (number - (len(names) - 1) / 2) * width for place in range(len(results))]
        heights = [times[arm] / max(mix) for mix, times in results.values()]
        axis.bar(at, heights, width, label=arm, color=f"C{number}")
    axis.axhline(1, color="black", lw=0.8)
    labels = [f"{name}\n{'/'.join(f'{stage:g}' for stage in mix)}" for name, (mix, _) in results.items()]
    axis.set_xticks(range(len(results)), labels, fontsize=7, rotation=20)
    axis.set_ylabel("time per batch / longest stage")
    axis.set_title("emulated HPU, stages: prepare / copy in / compute / copy out / finish, ms", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def parser_of_mixes(description: str | None, *, scale: float, plot: bool = False) -> argparse.ArgumentParser:
    """A command line with `--mix` and `--scale`."""
    found = parser(description, plot=plot)
    found.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES), metavar="MIX")
    why = f"default {scale:g}: the emulator's own work takes the host about 2 ms per batch"
    found.add_argument("--scale", type=float, default=scale, help=f"times the stages' times, {why}")
    return found


def mixes(options: argparse.Namespace) -> dict[str, Mix]:
    """The mixes that were asked for, at their scale."""
    return {name: Mix(*(options.scale * stage for stage in MIXES[name])) for name in options.mix}


def unseen(number: int, seed: int) -> dict[str, Mix]:
    """Mixes that nobody chose."""
    draw = random.Random(seed)
    return {
        f"unseen {each + 1}": Mix(*(float(draw.randint(*UNSEEN_MS)) for _ in Mix._fields)) for each in range(number)
    }


def main() -> None:
    arguments = parser_of_mixes(__doc__, scale=4, plot=True)
    arguments.add_argument("--batches", type=int, default=120, help=f"{FILL + DRAIN} of them do not count")
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--unseen", type=int, default=0, metavar="N", help="so many mixes of random times instead")
    arguments.add_argument("--seed", type=int, default=0, help="of --unseen")
    arguments.add_argument("--ours", action="store_true", help="leave out stock Lightning and the guide's loop")
    options = arguments.parse_args()
    quiet()
    output = console()
    wanted = {name: run for name, run in arms().items() if not (options.ours and name.startswith(IN_ORDER))}
    batches, rounds = options.batches, options.rounds
    chosen = unseen(options.unseen, options.seed) if options.unseen else mixes(options)
    results = {name: (mix, measure_all(mix, batches, rounds, wanted)) for name, mix in chosen.items()}
    show(results, output)
    if options.plot:
        plot(results, options.plot)
    figures = [{"mix": name, "stages": mix._asdict(), "ms": times} for name, (mix, times) in results.items()]
    finish(output, options, "hpu", results=figures)


if __name__ == "__main__":
    main()
