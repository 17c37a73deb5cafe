"""Host time that the loop costs per batch: a plain loop, the guide's pipelined loop, stock Lightning, and the plugin.

    python -m benchmarks.overhead [--device cpu hpu] [--rounds 11] [--batches 1000] [--json FILE] [--plot FILE]

The module is one small linear layer, so that almost all of the time is the loop's own. Arms take turns in one process;
all predictions are compared first. A Trainer's set-up is left out: time runs from the module's `on_predict_epoch_start`
to its `on_predict_epoch_end`. "hpu" is the emulator, with stages that take no time: its figures are emulated.
"""

import contextlib
import gc
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.common import BARE, DEVICES, OFF, console, finish, in_turn, parser, quiet
from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.observe.run import TracedRun

WIDTH = 8
FLAGS: dict[str, dict[str, Any]] = {
    "all flags off": OFF,
    "graphs only": OFF | {"hpu_graphs": True},
    "async_copy only": OFF | {"async_copy": True},
    "pipelining only": OFF | {"pipelining": True},
    "defaults": {},
    "prefetch=2": {"prefetch": 2},
    "prefetch=0": {"prefetch": 0},
}
SAME = {"cpu": {"graphs only", "async_copy only", "prefetch=0"}, "hpu": {"prefetch=2"}}
"""Flags that are the same as others on a device: the CPU has no graphs and no copies, and does not prefetch unasked."""
TARGETS = {"no callbacks": 1 / 3, "5 callbacks": 1 / 2, "tqdm bar": 1.0}
"""How much of what stock Lightning costs above the plain loop we allow ourselves."""
TRACED = 0.05
"""How much a trace may add to a loop that loads its data and computes next to nothing."""


class Net(LightningModule):
    """One linear layer; takes the time of its own run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(WIDTH, WIDTH)
        self.seconds = 0.0

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch)

    def on_predict_epoch_start(self) -> None:
        self.seconds = -time.perf_counter()

    def on_predict_epoch_end(self) -> None:
        self.seconds += time.perf_counter()


class Both(Callback):
    """Overrides both batch hooks and does nothing in them."""

    def on_predict_batch_start(self, *_: Any) -> None: ...

    def on_predict_batch_end(self, *_: Any) -> None: ...


class Ready:
    """Batches that are there already. Lightning takes a plain list for several dataloaders."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class StockOnHPU(HPUInferenceAccelerator):
    """Lets Lightning know the device and leaves its loop alone."""

    def setup(self, trainer: Trainer) -> None:
        """Change nothing."""


Run = Callable[[Iterable[Tensor]], tuple[list[Tensor], float]]
"""Predictions of these batches, and the seconds they took."""


def plain(device: str) -> Run:
    net, mark_step = Net().net.to(device), _mark_step(device)

    @torch.inference_mode()
    def run(batches: Iterable[Tensor]) -> tuple[list[Tensor], float]:
        start, outputs = time.perf_counter(), []
        for batch in batches:
            output = net(batch.to(device))
            mark_step()
            outputs.append(output.to("cpu"))
        return outputs, time.perf_counter() - start

    return run


def by_hand(device: str) -> Run:
    """The loop of Intel's guide "Optimize Inference on PyTorch", with all three techniques."""
    net, mark_step = Net().net.eval().to(device), _mark_step(device)
    if device == "hpu":
        import habana_frameworks.torch.hpu as hpu

        net = hpu.wrap_in_hpu_graph(net, disable_tensor_cache=True)

    @torch.inference_mode()
    def run(queries: Iterable[Tensor]) -> tuple[list[Tensor], float]:
        start, outputs = time.perf_counter(), []
        rest = iter(queries)
        query = next(rest, None)
        while query is not None:
            output = net(query.to(device, non_blocking=True))
            mark_step()
            query = next(rest, None)
            outputs.append(output.to("cpu"))
        return outputs, time.perf_counter() - start

    return run


def _mark_step(device: str) -> Callable[[], None]:
    if device == "cpu":
        return lambda: None
    import habana_frameworks.torch.core as htcore

    return htcore.mark_step


def lightnings(accelerator: Callable[[], Any], callbacks: Callable[[], list[Callback]]) -> Run:
    def run(batches: Iterable[Tensor]) -> tuple[list[Tensor], float]:
        net, bar = Net(), callbacks()
        options = BARE | {"enable_progress_bar": any(isinstance(callback, TQDMProgressBar) for callback in bar)}
        # What a bar writes costs time too, but not that of a terminal.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            outputs: Any = Trainer(accelerator=accelerator(), callbacks=bar, **options).predict(net, batches)
        return outputs, net.seconds

    return run


class Arm(NamedTuple):
    """One way to predict."""

    group: str
    name: str
    run: Run


def names_of(device: str) -> list[str]:
    return [name for name in FLAGS if name not in SAME[device]]


def arms(device: str) -> list[Arm]:
    stock: Callable[[], Any] = StockOnHPU if device == "hpu" else lambda: "cpu"
    groups: dict[str, Callable[[], list[Callback]]] = {
        "no callbacks": list,
        "5 callbacks": lambda: [Both() for _ in range(5)],
        "tqdm bar": lambda: [TQDMProgressBar()],
    }
    found = [Arm("by hand", "plain loop", plain(device)), Arm("by hand", "guide's loop", by_hand(device))]
    if device == "hpu":  # The targets are for the CPU, and an emulated batch takes its time.
        groups = {"no callbacks": list}
    for group, callbacks in groups.items():
        found.append(Arm(group, "stock", lightnings(stock, callbacks)))
        for name in names_of(device):
            flags = FLAGS[name]
            found.append(Arm(group, name, lightnings(partial(HPUInferenceAccelerator, **flags), callbacks)))
    return found


def sources(batches: int) -> dict[str, Callable[[], Iterable[Tensor]]]:
    rows = torch.randn(batches, WIDTH, generator=torch.Generator().manual_seed(0))
    ready = list(rows.split(1))
    # Lightning gives a DataLoader's batches back in lists only where the dataset does.
    return {"ready batches": lambda: Ready(ready), "DataLoader": lambda: DataLoader(rows, 1)}  # type: ignore[arg-type]


class Result(NamedTuple):
    """One arm's times over the rounds, in microseconds per batch."""

    device: str
    source: str
    group: str
    name: str
    micros: list[float]

    def above(self, plain: "Result") -> list[float]:
        """What it costs above the plain loop of the same round."""
        return [own - base for own, base in zip(self.micros, plain.micros, strict=True)]


def measure(device: str, rounds: int, batches: int) -> list[Result]:
    """All arms on both sources. Raises if any arm's predictions differ."""
    results = []
    for source, make in list(sources(batches).items())[: 1 if device == "hpu" else None]:
        taking_turns = arms(device)
        expected = torch.cat(taking_turns[0].run(make())[0])
        for arm in taking_turns:  # also warms up
            torch.testing.assert_close(torch.cat(arm.run(make())[0]), expected, rtol=0, atol=0)
        micros: dict[Arm, list[float]] = {arm: [] for arm in taking_turns}
        for number in range(rounds):
            for arm in in_turn(taking_turns, number):
                gc.collect()
                micros[arm].append(arm.run(make())[1] / batches * 1e6)
        results += [Result(device, source, arm.group, arm.name, times) for arm, times in micros.items()]
    return results


def ratio(ours: Result, stock: Result, plain: Result) -> float:
    """What ours costs above the plain loop, as a part of what stock does: medians of the paired differences."""
    return statistics.median(ours.above(plain)) / statistics.median(stock.above(plain))


def show(results: list[Result], output: Console) -> None:
    for device, source in dict.fromkeys((result.device, result.source) for result in results):
        here = [result for result in results if (result.device, result.source) == (device, source)]
        plain = here[0]
        named = {(result.group, result.name): result for result in here}
        title = f"{'emulated HPU' if device == 'hpu' else 'CPU'}, {source}, {len(plain.micros)} rounds"
        columns = ("arm", "us/batch (median)", "quartiles", "least", "above plain", "of stock's", "target")
        table = Table(*columns, title=title)
        for result in here:
            low, middle, high = statistics.quantiles(result.micros, n=4)
            row = [f"{middle:.1f}", f"{low:.1f} to {high:.1f}", f"{min(result.micros):.1f}"]
            if result is not plain:
                row.append(f"{statistics.median(result.above(plain)):.1f}")
            if result.group in TARGETS and result.name != "stock":
                part, target = ratio(result, named[result.group, "stock"], plain), TARGETS[result.group]
                verdict = "" if device == "hpu" else f"{target:.2f} {'met' if part <= target else 'missed'}"
                row += [f"{part:.2f}", verdict]
            name = result.name if result.group == "by hand" else f"{result.group}: {result.name}"
            table.add_row(name, *row, end_section=result.name == names_of(device)[-1])
        output.print(table)


class Endless:
    """The same batch, over and over, so that data take no memory."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        row = torch.ones(1, WIDTH)
        return (row for _ in range(self.batches))


class Resident(Net):
    """Also takes the mebibytes that the process gained, outside of the time that it takes."""

    def on_predict_epoch_start(self) -> None:
        self.gained = -resident_mib()
        super().on_predict_epoch_start()

    def on_predict_epoch_end(self) -> None:
        super().on_predict_epoch_end()
        self.gained += resident_mib()


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(output: Console, lengths: tuple[int, ...] = (100, 1_000, 20_000)) -> list[dict[str, Any]]:
    """Whether a batch costs more, or memory grows, the longer a run is. Nothing is kept of the predictions."""
    found = []
    table = Table("arm", "batches", "us/batch (least of 3)", "MiB gained", title="CPU, growth with the run's length")
    makers: dict[str, Callable[[], Any]] = {"stock": lambda: "cpu"}
    makers |= {name: partial(HPUInferenceAccelerator, **FLAGS[name]) for name in names_of("cpu")}
    for name, make in makers.items():
        for batches in lengths:
            micros, gained = [], []
            for _ in range(3 if batches < 10_000 else 1):
                net = Resident()
                Trainer(accelerator=make(), **BARE).predict(net, Endless(batches), return_predictions=False)
                micros.append(net.seconds / batches * 1e6)
                gained.append(net.gained)
            found.append({"arm": name, "batches": batches, "micros": min(micros), "mib": min(gained)})
            table.add_row(name, f"{batches:,}", f"{min(micros):.1f}", f"{min(gained):.2f}")
    output.print(table)
    return found


def tracing(output: Console, rounds: int, batches: int = 200) -> list[dict[str, Any]]:
    """What `trace=` adds to a batch on the CPU. The report, made after a run, is left out.

    Runs are short and many, and the first quartile of them is shown: a few microseconds drown in what other
    processes do.
    """
    table = Table("arm", "us/batch", "traced", "part", "target", title=f"CPU, cost of a trace, {rounds} rounds")
    found = []
    with tempfile.TemporaryDirectory() as folder, patch.object(TracedRun, "finish", lambda *_: None):
        for source, make in sources(batches).items():
            for name in ("all flags off", "defaults"):
                runs = [
                    lightnings(partial(HPUInferenceAccelerator, **flags), list)
                    for flags in (FLAGS[name], FLAGS[name] | {"trace": folder})
                ]
                micros: tuple[list[float], list[float]] = ([], [])
                for number in range(rounds):
                    for arm in (0, 1) if number % 2 else (1, 0):
                        micros[arm].append(runs[arm](make())[1] / batches * 1e6)
                without, traced = (statistics.quantiles(times, n=4)[0] for times in micros)
                found.append({"arm": f"{source}, {name}", "micros": without, "traced": traced})
                part = traced / without - 1
                target = "" if source != "DataLoader" else f"{TRACED:.0%} {'met' if part <= TRACED else 'missed'}"
                table.add_row(f"{source}, {name}", f"{without:.1f}", f"{traced:.1f}", f"{part:.1%}", target)
    output.print(table)
    return found


def plot(results: list[Result], path: Path) -> None:
    """Bars of what each arm costs above the plain loop, with its quartiles."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((result.device, result.source) for result in results))
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (device, source) in zip(axes[0], panels, strict=True):
        here = [result for result in results if (result.device, result.source) == (device, source)]
        names = ["stock", *names_of(device)]
        width = 0.85 / len(names)
        for offset, name in enumerate(names):
            of_name = [result for result in here if result.name == name]
            spans = [statistics.quantiles(result.above(here[0]), n=4) for result in of_name]
            middles = [middle for _, middle, _ in spans]
            errors = [[middle - low for low, middle, _ in spans], [high - middle for _, middle, high in spans]]
            at = [place + (offset - (len(names) - 1) / 2) * width for place in range(len(of_name))]
            color = "0.6" if name == "stock" else f"C{list(FLAGS).index(name)}"
            axis.bar(at, middles, width, yerr=errors, label=name, color=color, error_kw={"lw": 0.8})
        axis.set_xticks(range(len(of_name)), [result.group for result in of_name])
        axis.set_title(f"{'emulated HPU' if device == 'hpu' else 'CPU'}, {source}", fontsize=10)
        axis.set_ylabel("µs per batch above a plain loop")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = parser(__doc__, plot=True)
    arguments.add_argument("--device", nargs="+", choices=DEVICES, default=list(DEVICES))
    arguments.add_argument("--rounds", type=int, default=11)
    arguments.add_argument("--batches", type=int, default=1000, help="on the CPU; a quarter of it on the emulator")
    arguments.add_argument("--no-growth", action="store_true", help="leave out the runs of up to 20,000 batches")
    options = arguments.parse_args()
    quiet()
    torch.set_num_threads(1)
    output, results, grown, traced = console(), [], [], []
    if "cpu" in options.device:
        results += measure("cpu", options.rounds, options.batches)
        traced = tracing(output, 10 * options.rounds)
        grown = [] if options.no_growth else growth(output)
    if "hpu" in options.device:
        emulator.install()
        results += measure("hpu", options.rounds, max(options.batches // 4, 10))
        emulator.uninstall()
    show(results, output)
    if options.plot:
        plot(results, options.plot)
    figures = [result._asdict() for result in results]
    finish(output, options, *options.device, results=figures, growth=grown, tracing=traced)


if __name__ == "__main__":
    main()
