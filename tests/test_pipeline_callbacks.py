"""The pipeline's own thread, in which callbacks of futures run, waits for nothing that it has to compute."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hpu_infer import InferencePipeline
from tests.helpers import Gate, gated


@pytest.mark.parametrize("way", ["result", "exception", "pop", "predict", "a generator that has begun"])
def test_a_callback_that_would_wait_for_its_own_thread_is_told_so(way: str) -> None:
    """And nothing is lost by that."""
    called = threading.Event()
    errors: list[BaseException] = []

    def callback(_: Future[Any]) -> None:
        try:
            waits[way]()
        except RuntimeError as error:
            errors.append(error)
        finally:
            called.set()

    def pushed_and_popped() -> None:
        pipeline.push(ones)
        pipeline.pop()

    gate, ones = Gate(), torch.ones(1)
    gate.opened.set()
    with InferencePipeline(gate, "cpu") as pipeline:
        begun = pipeline.predict([ones] * 20)
        next(begun)
        waits: dict[str, Callable[[], Any]] = {
            "result": lambda: pipeline.submit(ones).result(),
            "exception": lambda: pipeline.submit(ones).exception(),
            "pop": pushed_and_popped,
            "predict": lambda: list(pipeline.predict([ones])),
            "a generator that has begun": lambda: list(begun),
        }
        gate.opened.clear()
        pipeline.submit(ones).add_done_callback(callback)
        gate.opened.set()
        assert called.wait(60)
        assert ["would wait for a result" in str(error) for error in errors] == [True]
        if way == "pop":
            assert pipeline.pop() == torch.full((1,), 2.0)
        assert pipeline.submit(ones).result(60) == torch.full((1,), 2.0)


def test_a_callback_may_look_at_what_is_done_and_for_a_while() -> None:
    found: Future[Any] = Future()

    def callback(future: Future[Any]) -> None:
        try:
            pipeline.submit(torch.ones(1)).result(timeout=0)
        except TimeoutError:
            found.set_result((first.result(), future.exception()))

    with gated() as (gate, pipeline):
        first = pipeline.submit(torch.zeros(1))
        pipeline.submit(torch.ones(1)).add_done_callback(callback)
        gate.opened.set()
        assert found.result(60) == (torch.ones(1), None)


def test_pop_that_is_interrupted_loses_nothing() -> None:
    class Interrupts(Future[Any]):
        def exception(self, timeout: float | None = None) -> Any:
            self.__class__ = Future  # type: ignore[assignment]
            raise KeyboardInterrupt

    with InferencePipeline(nn.Identity(), "cpu") as pipeline:
        for number in range(2):
            pipeline.push(torch.full((1,), float(number)))
        pipeline._pushed[0].__class__ = Interrupts
        with pytest.raises(KeyboardInterrupt):
            pipeline.pop()
        assert [int(pipeline.pop()) for _ in range(2)] == [0, 1]
