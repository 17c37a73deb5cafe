"""What tracing costs, what replays save, and after how many batches that pays. Figures are emulated, not a Gaudi's.

    python -m benchmarks.graphs [--rounds 5] [--batches 30] [--layers 12] [--json FILE]

A BERT with random weights, sentences of ids with an ordinary two-dimensional mask, mean pooling and normalisation in
the step: small, so that launching its ops takes longer than computing them. The emulator queues ops in Python, the
bridge in C++, so the ratios are not to be expected of a Gaudi. Arms take turns; their outputs are compared.

1. Steady host time per batch: the plain step, graphs, and graphs with an empty replay, which is what guards and
   comparisons of weights cost.
2. Seconds of tracing for the first, second and third shape.
3. Blocks (`graph_modules="blocks"`) against the whole step, on twice as many layers.
4. Break-even, in batches: the time that tracing and capturing took, by what a batch saves. Launch-bound, and
   device-bound, where each batch is one program of `--device-ms` (the encoder gets no mask, of which transformers reads
   a value and so makes two programs).
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertModel

from benchmarks.common import console, finish, in_turn, parser, quiet
from lightning_hpu_infer import InferenceConfig, _habana, emulator
from lightning_hpu_infer.graphs import StepGraphs
from lightning_hpu_infer.graphs.capture import CapturedGraph

HPU = torch.device("hpu", 0)
SHAPES = ((4, 16), (3, 16), (2, 24))
Step = Callable[[Any], Tensor]


def model(layers: int) -> BertModel:
    """An encoder whose ops are small."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 500}
    return BertModel(BertConfig(num_hidden_layers=layers, **sizes)).eval().to(HPU)


def step_of(net: BertModel, *, masked: bool = True) -> Step:
    """What a user writes around an encoder."""

    def step(batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        states = (net(**batch) if masked else net(batch["input_ids"])).last_hidden_state * mask
        return torch.nn.functional.normalize(states.sum(1) / mask.sum(1))

    return step


def batch(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Token ids with real padding, on the device."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, length // 2 :] = 0
    ids = torch.randint(1, 500, (rows, length), generator=generator)
    return {"input_ids": ids.to(HPU), "attention_mask": mask.to(HPU)}


@dataclass
class Arm:
    """One way to run the step, and what it cost."""

    name: str
    graph_modules: Any = None
    graphs: bool = True
    tracing_s: float = 0.0
    """Dynamo, the examination of its graphs, captures and their verification: all beyond steady batches."""
    traced_s: float = 0.0
    """Of that, what Dynamo and the examination took."""
    traces: int = 0
    captures: int = 0
    host_ms: float = 0.0
    """Median host time of a steady batch."""
    batch_ms: float = 0.0
    """Median time of a steady batch with the wait for the one before, as the pipeline runs it."""


@contextmanager
def attached(arm: Arm, net: BertModel, *, masked: bool = True) -> Iterator[tuple[Step, StepGraphs | None]]:
    """The step as an arm runs it."""
    if not arm.graphs:
        yield step_of(net, masked=masked), None
        return
    config = InferenceConfig(hpu_graphs="hpu_graph", graph_modules=arm.graph_modules)
    graphs = StepGraphs(net, HPU, config, "hpu_graph")
    with graphs.attached(step_of(net, masked=masked)) as step:
        yield step, graphs
    graphs.release()


def steady(step: Step, count: int) -> tuple[list[float], list[float], Tensor]:
    """Host and whole milliseconds of batches, each fetched after the next one was launched, and the last output."""
    host, whole, before = [], [], None
    data = batch(*SHAPES[0])
    for _ in range(count):
        start = time.perf_counter()
        output = step(data)
        _habana.mark_step()
        launched = time.perf_counter()
        if before is not None:
            before.cpu()
        host.append(1e3 * (launched - start))
        whole.append(1e3 * (time.perf_counter() - start))
        before = output
    assert before is not None
    return host, whole, before.cpu()


def measure(arms: list[Arm], layers: int, rounds: int, batches: int, *, masked: bool) -> None:
    """Fill in the figures of arms that take turns. Raises if their outputs differ."""
    net, expected = model(layers), None
    host: dict[str, list[float]] = {arm.name: [] for arm in arms}
    whole: dict[str, list[float]] = {arm.name: [] for arm in arms}
    tracing: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for number in range(rounds):
        for arm in in_turn(arms, number):
            with attached(arm, net, masked=masked) as (step, graphs):
                start = time.perf_counter()
                for _ in range(4):  # plain, traced and captured, verified twice
                    step(batch(*SHAPES[0])).cpu()
                first = time.perf_counter() - start
                times = steady(step, batches)
                if expected is None:
                    expected = times[2]
                torch.testing.assert_close(times[2], expected, rtol=1e-3, atol=1e-4)
                host[arm.name] += times[0]
                whole[arm.name] += times[1]
                tracing[arm.name].append(first - 4 * statistics.median(times[1]) / 1e3)
                if graphs is not None:
                    counts = graphs.counts
                    arm.traces, arm.captures, arm.traced_s = counts.traces, counts.captures, counts.trace_seconds
    for arm in arms:
        arm.host_ms, arm.batch_ms = statistics.median(host[arm.name]), statistics.median(whole[arm.name])
        arm.tracing_s = statistics.median(tracing[arm.name]) if arm.graphs else 0.0


def cost_of_guards(layers: int, calls: int) -> list[float]:
    """Microseconds per call of everything but the replay: guards, identities of weights, our own Python."""
    net, replay = model(layers), CapturedGraph._run
    with attached(Arm("graphs"), net) as (step, _):
        data = batch(*SHAPES[0])
        for _ in range(5):
            output = step(data)
        try:
            CapturedGraph._run = lambda *_: [output]  # type: ignore[method-assign]
            found = []
            for _ in range(calls):
                start = time.perf_counter()
                step(data)
                found.append(1e6 * (time.perf_counter() - start))
        finally:
            CapturedGraph._run = replay  # type: ignore[method-assign]
    return found


def cost_of_shapes(layers: int) -> list[float]:
    """Seconds of tracing that each further shape took."""
    net, seconds, before = model(layers), [], 0.0
    with attached(Arm("graphs"), net) as (step, graphs):
        assert graphs is not None
        for shape in SHAPES:
            for _ in range(3):
                step(batch(*shape))
            seconds.append(graphs.counts.trace_seconds - before)
            before = graphs.counts.trace_seconds
    return seconds


def break_even(plain: Arm, arm: Arm) -> str:
    """Batches after which an arm has won back what it cost."""
    saved = plain.batch_ms - arm.batch_ms
    # Less than the noise of a batch is nothing.
    return f"{arm.tracing_s * 1e3 / saved:.0f}" if saved > 0.03 * plain.batch_ms else "never"


def table_of(title: str, arms: list[Arm]) -> Table:
    """Figures of arms, the first of which is the plain one."""
    columns = ("arm", "traces", "captures", "traced s", "all that it costs s", "host ms/batch", "ms/batch")
    table = Table(*columns, "pays after batches", title=title)
    for arm in arms:
        table.add_row(
            arm.name, str(arm.traces), str(arm.captures), f"{arm.traced_s:.2f}", f"{arm.tracing_s:.2f}",
            f"{arm.host_ms:.2f}", f"{arm.batch_ms:.2f}", break_even(arms[0], arm) if arm.graphs else "",
        )  # fmt: skip
    return table


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batches", type=int, default=30)
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--device-ms", type=float, default=40.0)
    options = arguments.parse_args()
    quiet()
    torch.set_num_threads(1)
    output, figures = console(), dict[str, Any]()
    for device_ms in (0.0, options.device_ms):
        emulator.install(emulator.EmulatorConfig(program_ms=device_ms))
        bound = f"device-bound: programs of {device_ms:g} ms" if device_ms else "launch-bound"
        with torch.inference_mode():
            for layers in (options.layers, 2 * options.layers):
                arms = [Arm("plain", graphs=False), Arm("whole step")]
                if not device_ms:  # each block is a program, which would take as long as a whole batch does
                    arms.append(Arm("blocks", graph_modules="blocks"))
                measure(arms, layers, options.rounds, options.batches, masked=not device_ms)
                output.print(table_of(f"emulated HPU (not a Gaudi), {bound}, {layers} layers", arms))
                figures[f"{bound}, {layers} layers"] = [asdict(arm) for arm in arms]
            if not device_ms:
                guards = cost_of_guards(options.layers, 100 * options.rounds)
                quartiles = [round(each) for each in statistics.quantiles(guards, n=4)]
                output.print(f"a call without its replay, {options.layers} layers: quartiles {quartiles} us")
                shapes = cost_of_shapes(options.layers)
                output.print("seconds of tracing, shape by shape:", ", ".join(f"{each:.2f}" for each in shapes))
                figures |= {"guards_us": quartiles, "shapes_s": shapes}
        emulator.uninstall()
    finish(output, options, "hpu", figures=figures)


if __name__ == "__main__":
    main()
