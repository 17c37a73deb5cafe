"""The pool of `postprocess`: order, bounds, errors, modes, and its end. Its processes are in test_workers.py."""

import contextvars
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpu_infer import postprocess
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe.spans import Trace
from lightning_hpu_infer.observer import Lane, Stage
from lightning_hpu_infer.postprocess import Postprocess
from tests.helpers import Broken


def pool(function: Callable[[Any], Any] | None, workers: int = 2, **kwargs: Any) -> Postprocess[Any]:
    return Postprocess(options(function, workers), torch.inference_mode, **kwargs)


def options(function: Callable[[Any], Any] | None, workers: int) -> InferenceConfig:
    return InferenceConfig(postprocess=function, postprocess_workers=workers)


def all_of(stage: Postprocess[Any], outputs: Any) -> list[tuple[Any, Any]]:
    """What comes of outputs, as a loop takes it."""
    taken = []
    for index, output in enumerate(outputs):
        stage.submit(index, output, index)
        while stage.over_capacity:
            taken.append(stage.take())
    while stage:
        taken.append(stage.take())
    return taken


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_are_in_order(workers: int) -> None:
    with pool(lambda output: 10 * output, workers) as stage:
        assert all_of(stage, range(20)) == [(index, 10 * index) for index in range(20)]


def test_without_a_function_an_output_passes_as_it_is() -> None:
    output = object()
    with pool(None) as stage:
        assert stage.depth == 0
        stage.submit(0, output, 0)
        assert stage.over_capacity
        assert stage.take()[1] is output


@pytest.mark.parametrize("flags", [{"pipelining": False}, {"postprocess_workers": 0}])
def test_no_worker_is_started_where_none_may_be(flags: dict[str, Any]) -> None:
    assert Postprocess[int](InferenceConfig(postprocess=str, **flags), torch.no_grad).depth == 0
    assert pool(str, threads=False).depth == 0


def test_in_place_it_is_called_by_the_caller_when_it_is_taken() -> None:
    called: list[int] = []
    with pool(lambda output: called.append(threading.get_ident()), 0) as stage:
        stage.submit(0, None, 0)
        assert not called
        assert stage.over_capacity
        stage.take()
    assert called == [threading.get_ident()]


def test_several_run_at_once_and_the_one_that_is_done_first_waits_for_its_turn() -> None:
    second_done = threading.Event()

    def function(index: int) -> int:
        if index == 0:
            assert second_done.wait(10)
        else:
            second_done.set()
        return index

    with pool(function) as stage:
        assert all_of(stage, range(2)) == [(0, 0), (1, 1)]


def test_rule_9_as_many_outputs_as_it_says_are_in_it() -> None:
    most = 0
    with pool(lambda output: output) as stage:
        for index in range(20):
            stage.submit(index, index, index)
            most = max(most, len(stage))
            while stage.over_capacity:
                stage.take()
            assert len(stage) <= stage.depth == 4
    assert most == 5
    assert len(stage) == 0


def broken_at_two(index: int) -> int:
    if index == 2:
        raise Broken("no such token")
    return index


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_at_its_place_and_names_the_batch(workers: int) -> None:
    with pool(broken_at_two, workers) as stage:
        for index in range(4):
            stage.submit(f"batch {index}", index, index)
        assert [stage.take()[1], stage.take()[1]] == [0, 1]
        with pytest.raises(Broken, match="no such token") as raised:
            stage.take()
        assert stage.take()[1] == 3
    words = "".join(traceback.format_exception(raised.value))
    assert "raise Broken" in words
    assert "Raised by `postprocess` of batch 2." in words


def test_stop_iteration_does_not_end_the_run_quietly() -> None:
    with pool(lambda output: next(iter(()))) as stage:
        stage.submit("batch 0", None, 0)
        with pytest.raises(RuntimeError, match="`postprocess` of batch 0 raised StopIteration"):
            stage.take()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_and_context_variables_are_the_callers(mode: Any, workers: int) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    weight = torch.ones(1, requires_grad=True)

    def function(output: Tensor) -> tuple[bool, bool, str]:
        result = output * weight
        return result.requires_grad, result.is_inference(), variable.get()

    variable.set("set")
    with mode(), Postprocess[int](options(function, workers), mode) as stage:
        stage.submit(0, torch.ones(1), 0)
        assert stage.take()[1] == (False, mode is torch.inference_mode, "set")


def test_each_thread_uses_one_thread_of_torch_and_others_as_many_as_before() -> None:
    before = torch.get_num_threads()
    others: list[int] = []
    torch.set_num_threads(3)
    try:
        with pool(lambda output: torch.get_num_threads()) as stage:
            assert all_of(stage, range(2)) == [(0, 1), (1, 1)]
            thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert [torch.get_num_threads(), *others] == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_leaving_waits_for_what_runs_and_does_not_begin_the_rest() -> None:
    began, may_end, ended = threading.Event(), threading.Event(), []

    def function(index: int) -> None:
        began.set()
        assert may_end.wait(10)
        ended.append(index)

    with pool(function, 1) as stage:
        stage.submit(0, 0, 0)
        stage.submit(1, 1, 1)
        assert began.wait(10)
        # When it is left, the second is cancelled.
        stage._pending[1][2].add_done_callback(lambda _: may_end.set())
    assert ended == [0]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hpu-infer-postprocess")]
    stage.close()


def test_what_does_not_return_is_left_behind_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end = threading.Event(), threading.Event()

    def function(output: Any) -> None:
        began.set()
        may_end.wait(10)

    monkeypatch.setattr(postprocess, "_JOIN_SECONDS", 0.05)
    stage = pool(function, 1)
    stage.submit(0, 0, 0)
    assert began.wait(10)
    (thread,) = (each for each in threading.enumerate() if each.name.startswith("hpu-infer-postprocess"))
    with pytest.warns(UserWarning, match="did not return within 0.05 s after prediction ended. 1 of its threads"):
        stage.close()
    may_end.set()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("workers", [0, 2])
def test_its_spans(workers: int) -> None:
    trace = Trace()
    with pool(lambda output: output, workers, observer=trace) as stage:
        all_of(stage, range(3))
    spans = {(span.stage, span.lane, span.batch) for span in trace.spans()}
    if workers:
        expected = {(Stage.POSTPROCESS, Lane.POSTPROCESS, i) for i in range(3)}
        expected |= {(Stage.WAIT_POSTPROCESS, Lane.MAIN, i) for i in range(3)}
    else:
        expected = {(Stage.POSTPROCESS, Lane.MAIN, i) for i in range(3)}
    assert spans == expected
