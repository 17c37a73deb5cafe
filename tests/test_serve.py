"""The service of examples/serve.py: right answers, errors for those who made them, and a clean end."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Broken

serve = pytest.importorskip("examples.serve", exc_type=ImportError)  # sets an environment variable
ROOT = Path(__file__).parents[1]
# No more than MiniLM and torch need, so that a leak fails.
MEMORY = 4 * 2**30


@contextmanager
def service(*options: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """Its address and its process, which is ended by its id."""
    limited = "import resource, runpy, sys; sys.argv = sys.argv[1:]; "
    limited += f"resource.setrlimit(resource.RLIMIT_DATA, ({MEMORY}, {MEMORY})); "
    limited += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", limited, str(ROOT / "examples" / "serve.py"), "--port", "0", *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def ask(address: str, path: str, body: Any = None) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


SENTENCES = [f"Sentence number {number} has {'many ' * (number % 9)}words." for number in range(24)]
BAD: list[Any] = [{"sentences": []}, {"sentences": "text"}, {"sentences": ["x" * 5000]}, {}]


@pytest.mark.parametrize("device", ["auto", pytest.param("emulator", marks=pytest.mark.full)])
@pytest.mark.timeout(300)
def test_requests_at_once_get_their_own_answers_and_it_ends_cleanly(device: str) -> None:
    model = serve.Embedder().eval()
    tokenizer = serve.Tokenizer.from_file(f"{serve.get_model_path()}/tokenizer.json")
    tokenizer.no_padding()
    with service("--device", device) as (address, process):
        assert ask(address, "/health") == (200, '{"status":"ok"}')
        bodies = [{"sentences": [sentence]} for sentence in SENTENCES]
        bodies[5:5], bodies[9:9] = BAD[:2], BAD[2:]
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(lambda body: ask(address, "/embed", body), bodies))
        assert [status for status, _ in answers] == [422 if body in BAD else 200 for body in bodies]
        found = [json.loads(text)["embeddings"][0] for status, text in answers if status == 200]
        with torch.inference_mode():
            for sentence, embedding in zip(SENTENCES, found, strict=True):
                ids = torch.tensor([tokenizer.encode(sentence).ids])
                expected = model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0]
                torch.testing.assert_close(torch.tensor(embedding), expected, rtol=1e-3, atol=1e-4)
        _, metrics = ask(address, "/metrics")
        assert 'requests_total{status="200"} 24.0' in metrics
        assert 'requests_total{status="422"} 4.0' in metrics
        assert "requests_in_flight 0.0" in metrics
        assert "request_seconds_count 28.0" in metrics
        assert "batch_rows_sum 24.0" in metrics
        process.send_signal(signal.SIGTERM)
        # uvicorn raises the signal again once all is closed.
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        assert "Error" not in process.stderr.read()


def test_ctrl_c_ends_it_cleanly() -> None:
    with service() as (address, process):
        assert ask(address, "/health")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("port", ["99999", "-1", "taken"])
def test_an_address_that_it_cannot_listen_at_is_an_error_of_the_command_line(
    port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1]) if port == "taken" else port
        monkeypatch.setattr(sys, "argv", ["serve.py", "--port", port])
        with pytest.raises(SystemExit) as exit_:
            serve.main()
    assert exit_.value.code == 2
    assert re.search(
        rf"serve\.py: error: (argument --port: must be .*{port}|127.0.0.1:{port}: )", capsys.readouterr().err
    )


class Sums(nn.Module):
    """Fails on a batch in which a sentence has the token 13."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        if (batch["input_ids"] == 13).any():
            raise Broken("token 13")
        return (batch["input_ids"] * batch["attention_mask"]).sum(1)


def test_a_sentence_that_the_model_fails_on_fails_alone_and_shapes_are_bounded() -> None:
    sentences = [[number % 20 + 1] * (number % 30 + 1) for number in range(200)]
    metrics = serve.Metrics()

    async def answers() -> list[Any]:
        async with serve.pipelined(Sums, metrics) as embed:
            return await asyncio.gather(*map(embed, sentences), return_exceptions=True)

    for ids, found in zip(sentences, asyncio.run(answers()), strict=True):
        if 13 in ids:
            assert isinstance(found, Broken)
        else:
            assert int(found) == sum(ids)
    assert metrics.errors._value.get() == sum(13 in ids for ids in sentences)
    batches = [serve.shaped([[1] * length] * rows, 32) for length in (1, 17, 32) for rows in range(1, 17)]
    assert {tuple(batch["input_ids"].shape) for batch in batches} == {(rows, 32) for rows in serve.ROWS}


@pytest.mark.parametrize("fails", ["model", "rows"])
def test_nobody_waits_for_a_sentence_that_another_gave_up(fails: str) -> None:
    class Fails(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            if fails == "model":
                raise Broken("no weights")
            return batch["input_ids"].float().mean().reshape(1)[:0]  # no row for anybody

    async def answers() -> list[Any]:
        with serve.InferencePipeline(Fails(), "cpu") as pipeline:
            batcher = serve.Batcher(pipeline, 0.01, metrics)
            first, *others = [asyncio.ensure_future(batcher.embed([1, 2])) for _ in range(4)]
            await asyncio.sleep(0)  # they wait
            first.cancel()
            return await asyncio.wait_for(asyncio.gather(first, *others, return_exceptions=True), 60)

    metrics = serve.Metrics()
    first, *others = asyncio.run(answers())
    assert isinstance(first, asyncio.CancelledError)
    assert {type(each) for each in others} == {Broken if fails == "model" else ValueError}
    assert metrics.errors._value.get() == 3
    assert metrics.rows._sum.get() == 3 + 3  # together, and each alone


async def call(app: Any, body: dict[str, Any]) -> int:
    """The status of an answer, without a server."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/embed", "query_string": b"", "http_version": "1.1"}
    await app({**scope, "headers": [(b"content-type", b"application/json")]}, receive, send)
    return int(sent[0]["status"])


def test_a_request_that_ends_in_an_exception_is_counted() -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        yield None  # the app has nothing to call

    async def status() -> None:
        app = serve.create_app(opened(), metrics)
        async with app.router.lifespan_context(app):
            with pytest.raises(TypeError):
                await call(app, {"sentences": ["one"]})

    metrics = serve.Metrics()
    asyncio.run(status())
    text = serve.generate_latest(metrics.registry).decode()
    assert 'requests_total{status="500"} 1.0' in text
    assert "request_seconds_count 1.0" in text
    assert "requests_in_flight 0.0" in text


def test_one_request_too_many_is_told_so_and_an_error_of_the_model_too() -> None:
    @asynccontextmanager
    async def opened() -> AsyncIterator[Any]:
        async def embed(ids: list[int]) -> Tensor:
            begun.set()
            await goes_on.wait()
            raise Broken("no weights")

        yield embed

    async def statuses() -> list[int]:
        app = serve.create_app(opened(), serve.Metrics(), max_requests=1)
        async with app.router.lifespan_context(app):
            first = asyncio.ensure_future(call(app, {"sentences": ["one"]}))
            await begun.wait()
            second = await call(app, {"sentences": ["two"]})
            goes_on.set()
            return [await first, second]

    begun, goes_on = asyncio.Event(), asyncio.Event()
    assert asyncio.run(statuses()) == [500, 503]
