"""Batches that come from many threads: each gets its own result or error, and closing leaves nobody waiting."""

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer import InferenceConfig, InferencePipeline, emulator
from tests.helpers import Broken, Gate, Net, Rows, assert_equal, gated, running

BROKEN = torch.zeros(1, 3)  # which `Net` cannot take


def row(number: int) -> Tensor:
    return Rows(number + 1).rows[number : number + 1]


def expected(number: int) -> Tensor:
    with torch.inference_mode():
        return Net().net(row(number))


CONFIGS: list[dict[str, Any]] = [
    {},
    {"in_flight": 3},
    {"hpu_graphs": False, "async_output": False},
    {"pipelining": False},
    {"postprocess": torch.clone},
]


@pytest.mark.filterwarnings("ignore:A part of `predict_step` runs without an HPU graph")  # for the broken ones
@pytest.mark.parametrize("flags", CONFIGS, ids=["defaults", "in_flight", "copies", "in order", "postprocess"])
def test_sixteen_threads_with_errors_in_between(flags: dict[str, Any], device: str) -> None:
    truth = [expected(number) for number in range(160)]

    def submit(first: int) -> None:
        numbers = range(first, 160, 16)
        futures = [pipeline.submit(row(number) if number % 7 else BROKEN) for number in numbers]
        for number, future in zip(numbers, futures, strict=True):
            if number % 7:
                assert_equal(future.result(60), truth[number])
            else:
                assert isinstance(future.exception(60), RuntimeError)

    with InferencePipeline(Net().net, config=InferenceConfig(**flags), max_pending=24) as pipeline:
        with ThreadPoolExecutor(16) as threads:
            for done in [threads.submit(submit, first) for first in range(16)]:
                done.result(60)
        # And `predict` goes on meanwhile, or afterwards.
        assert_equal(list(pipeline.predict([row(1), row(2)])), truth[1:3])
    if device == "emulator":
        assert emulator.stats().off_thread_calls == 0


def test_submit_and_predict_at_once(device: str) -> None:
    with InferencePipeline(Net().net) as pipeline:
        outputs = pipeline.predict([row(number) for number in range(20)])
        found = [next(outputs)]
        future = pipeline.submit(row(30))
        found += outputs
        assert_equal(future.result(60), expected(30))
    assert_equal(found, [expected(number) for number in range(20)])


def test_rule_2_the_device_is_called_by_one_thread_which_also_makes_the_model(device: str) -> None:
    threads: list[threading.Thread] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net
            threads.append(threading.current_thread())

        def forward(self, x: Tensor) -> Tensor:
            threads.append(threading.current_thread())
            return self.net(x)

    config = InferenceConfig(hpu_graphs=False)
    with InferencePipeline(Watched, config=config) as pipeline, ThreadPoolExecutor(4) as pool:
        futures = list(pool.map(lambda number: pipeline.submit(row(number)), range(8)))
        assert_equal([future.result(60) for future in futures], [expected(number) for number in range(8)])
        assert_equal(list(pipeline.predict([row(1)])), [expected(1)])
    assert len(threads) == 10
    assert len(set(threads)) == 1
    assert threads[0] is not threading.main_thread()
    if device == "emulator":
        assert emulator.stats().off_thread_calls == 0


def test_a_factory_that_fails_fails_the_constructor_and_leaves_no_thread(device: str) -> None:
    def broken() -> nn.Module:
        raise Broken("no weights")

    before = running()
    with pytest.raises(Broken, match="no weights"):
        InferencePipeline(broken)
    with pytest.raises(TypeError, match=r"returns one, and it returned dict"):
        InferencePipeline(dict)  # type: ignore[arg-type]
    assert running() == before


def test_rule_7_memory_may_be_filled_again_after_submit(device: str) -> None:
    memory = torch.empty(1, 4)
    with InferencePipeline(Net().net) as pipeline:
        futures = [pipeline.submit(memory.copy_(row(number))) for number in range(20)]
        memory.zero_()
    assert_equal([future.result() for future in futures], [expected(number) for number in range(20)])


def test_an_error_while_a_batch_is_prepared_reaches_its_future_only() -> None:
    config = InferenceConfig(bucket_lengths=[8], pad_spec="tokenizer")
    with InferencePipeline(Lookup(), "cpu", config) as pipeline:
        bad, good = pipeline.submit({"x": torch.zeros(1, 3)}), pipeline.submit({"input_ids": torch.ones(1, 3)})
        with pytest.raises(ValueError, match="The batch has no tensor `input_ids`"):
            bad.result(60)
        assert good.result(60) == 3


class Lookup(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["input_ids"].sum()


# Room


def test_a_full_pipeline_raises_if_told_so() -> None:
    with gated(max_pending=2, when_full="raise") as (gate, pipeline):
        second = pipeline.submit(torch.ones(1))
        with pytest.raises(RuntimeError, match=r"full: 2 batches were submitted .*`max_pending`.*`when_full='wait'`"):
            pipeline.submit(torch.ones(1))
        gate.opened.set()
        assert second.result(60) == torch.full((1,), 2.0)
        assert pipeline.submit(torch.ones(1)).result(60) == torch.full((1,), 2.0)


def test_a_full_pipeline_waits_for_room() -> None:
    with gated(max_pending=2) as (gate, pipeline), ThreadPoolExecutor(1) as pool:
        pipeline.submit(torch.ones(1))
        third = pool.submit(pipeline.submit, torch.full((1,), 2.0))
        assert not wait([third], timeout=0.05).done
        gate.opened.set()
        assert third.result(60).result(60) == torch.full((1,), 3.0)
    assert gate.seen == [0, 1, 2]


def test_a_cancelled_batch_is_not_computed_and_gives_its_place_back() -> None:
    with gated(max_pending=2, when_full="raise") as (gate, pipeline):
        second = pipeline.submit(torch.ones(1))
        assert second.cancel()
        gate.opened.set()
        with pytest.raises(CancelledError):
            second.result(60)
        wait_until_idle(pipeline)
        pipeline.submit(torch.full((1,), 2.0)).result(60)
    assert gate.seen == [0, -1, 2]


def wait_until_idle(pipeline: InferencePipeline) -> None:
    """Until all that was submitted has had its turn; `predict` has room of its own."""
    list(pipeline.predict([torch.full((1,), -1.0)]))


def test_a_callback_may_submit_if_there_is_room_and_is_told_if_not() -> None:
    found: Future[Any] = Future()

    def submit_two(_: Future[Any]) -> None:
        try:
            found.set_result(pipeline.submit(torch.ones(1)))
            pipeline.submit(torch.ones(1))
        except RuntimeError as error:
            errors.append(str(error))

    errors: list[str] = []
    gate = Gate()
    with InferencePipeline(gate, "cpu", max_pending=1) as pipeline:
        pipeline.submit(torch.zeros(1)).add_done_callback(submit_two)
        gate.opened.set()
        assert found.result(60).result(60) == torch.full((1,), 2.0)
    assert len(errors) == 1
    assert "submit from another one" in errors[0]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_costs_nobody_a_result(kind: type[BaseException]) -> None:
    def raises(_: Future[Any]) -> None:
        called.append("first")
        raise kind

    called: list[str] = []
    gate = Gate()
    with InferencePipeline(gate, "cpu") as pipeline:
        futures = [pipeline.submit(torch.full((1,), float(number))) for number in range(4)]
        for future in futures[:2]:
            future.add_done_callback(raises)
            future.add_done_callback(lambda _: called.append("second"))
        assert futures[3].cancel()
        gate.opened.set()
        assert [float(future.result(60)) for future in futures[:3]] == [1, 2, 3]
        assert float(pipeline.submit(torch.ones(1)).result(60)) == 2
    assert called == ["first", "second"] * 2


def test_a_model_that_raises_cancelled_error_is_not_taken_for_a_pipeline_that_is_closed() -> None:
    class Cancels(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise CancelledError("by the model")

    with InferencePipeline(Cancels(), "cpu") as pipeline:
        with pytest.raises(CancelledError, match="by the model"):
            list(pipeline.predict([torch.ones(1)]))
        pipeline.push(torch.ones(1))
        with pytest.raises(CancelledError, match="by the model"):
            pipeline.pop()


class Interrupted(threading.Condition):
    """Interrupts the first one that waits when it has been notified."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: SimpleQueue[str] = SimpleQueue()
        self._first = True

    def wait(self, timeout: float | None = None) -> bool:
        first, self._first = self._first, False
        self.waiting.put("another one")
        super().wait(timeout)
        if first:
            raise KeyboardInterrupt
        return True


def test_a_place_whose_notice_is_interrupted_goes_to_another_one() -> None:
    with gated(max_pending=1) as (gate, pipeline), ThreadPoolExecutor(2) as pool:
        changed = pipeline._room._changed = Interrupted()
        waiting = []
        for _ in range(2):
            waiting.append(pool.submit(pipeline.submit, torch.ones(1)))
            changed.waiting.get(timeout=60)
        gate.opened.set()
        assert isinstance(waiting[0].exception(60), KeyboardInterrupt)
        assert waiting[1].result(60).result(60) == torch.full((1,), 2.0)


# Closing


@pytest.mark.parametrize("cancel", [False, True])
def test_closing_while_submits_wait_leaves_nobody_waiting(cancel: bool) -> None:
    gate = Gate()
    pipeline = InferencePipeline(gate, "cpu", max_pending=2)
    first, second = (pipeline.submit(torch.full((1,), float(number))) for number in range(2))
    assert gate.entered.wait(60)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(pipeline.submit, torch.full((1,), 2.0)) for _ in range(4)]
        assert not wait(waiting, timeout=0.05).done
        closing = [pool.submit(pipeline.close, cancel=cancel) for _ in range(4)]
        for future in waiting:
            assert isinstance(future.exception(60), RuntimeError)
            assert "closed" in str(future.exception(60))
        gate.opened.set()
        for done in closing:
            done.result(60)
    assert first.result(60) == torch.ones(1)
    if cancel:
        assert second.cancelled()
        assert gate.seen == [0]
    else:
        assert second.result(60) == torch.full((1,), 2.0)
        assert gate.seen == [0, 1]
    for use in (pipeline.submit, pipeline.push, pipeline.predict):
        with pytest.raises(RuntimeError, match="closed: make another one"):
            use([])
    assert pipeline.closed
    pipeline.close(cancel=True)


def test_leaving_with_an_error_cancels_and_without_one_computes(device: str) -> None:
    with InferencePipeline(Net().net) as pipeline:
        futures = [pipeline.submit(row(number)) for number in range(30)]
    assert_equal([future.result(0) for future in futures], [expected(number) for number in range(30)])
    gate = Gate()

    def leave() -> None:
        with InferencePipeline(gate, "cpu") as pipeline:
            futures.extend(pipeline.submit(torch.full((1,), float(number))) for number in range(2))
            assert gate.entered.wait(60)
            threading.Timer(0.02, gate.opened.set).start()
            raise Broken("elsewhere")

    with pytest.raises(Broken):
        leave()
    first, second = futures[-2:]
    assert first.result(60) == torch.ones(1)
    assert second.cancelled()


def test_closing_in_a_callback_ends_the_thread(device: str) -> None:
    threads = running()
    pipeline = InferencePipeline(Net().net)
    closed = threading.Event()

    def close(_: Future[Any]) -> None:
        pipeline.close()
        closed.set()

    pipeline.submit(row(1)).add_done_callback(close)
    assert closed.wait(60)
    pipeline.close()
    assert running() == threads


def test_closing_gives_up_on_a_model_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hpu_infer.engine._JOIN_SECONDS", 0.05)
    with gated() as (_, pipeline), pytest.warns(UserWarning, match="The model did not return within 0.05 s"):
        pipeline.close(cancel=True)


def test_a_pipeline_that_nobody_holds_computes_what_was_submitted_and_ends(device: str) -> None:
    threads = running()
    pipeline = InferencePipeline(Net().net)
    thread = next(each for each in threading.enumerate() if each.name == "hpu-infer-pipeline")
    futures = [pipeline.submit(row(number)) for number in range(10)]
    del pipeline
    assert_equal([future.result(60) for future in futures], [expected(number) for number in range(10)])
    thread.join(60)
    assert running() == threads


# Modes


def test_modes_of_a_thread_that_the_pipelines_has_not_are_refused() -> None:
    with InferencePipeline(Net().net, "cpu") as pipeline:
        with torch.autocast("cpu"), pytest.raises(RuntimeError, match="Pass `precision='bf16-mixed'`"):
            pipeline.submit(row(1))
        with torch.autocast("cpu"), pytest.raises(RuntimeError, match="Pass `precision='bf16-mixed'`"):
            pipeline.predict([row(1)])
        assert_equal(pipeline.submit(row(1)).result(60), expected(1))
