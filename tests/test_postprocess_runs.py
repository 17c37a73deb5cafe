"""`postprocess` in runs: predictions, hooks, writers, order and errors are those of a step that does it itself."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline
from lightning_hpu_infer.observer import Lane, Stage
from tests.helpers import Broken, HookLog, Net, Rows, Writer, assert_equal, predict, rows, running, trainer

pytestmark = pytest.mark.usefixtures("device")

FLAGS: list[dict[str, Any]] = [
    {},
    {"postprocess_workers": 0},
    {"postprocess_workers": 3, "in_flight": 3, "prefetch": 3},
    {"in_flight": 0, "prefetch": 0},
    {"pipelining": False},
    {"defer_hooks": False},
    {"defer_hooks": True, "async_output": False},
]


def labels(output: Tensor) -> list[str]:
    """A decoded batch: one string per sample."""
    return [f"{row.argmax().item()} {row.sum():.4f}" for row in output]


class Decoding(Net):
    """What the plugin is compared with: the step decodes."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return labels(self.net(batch).cpu())


class Words(Writer):
    """Records predictions that are no tensors."""

    def write_on_batch_end(
        self, t: Any, m: Any, prediction: Any, indices: Any, batch: Any, k: int, loader: int
    ) -> None:
        self.batches.append((loader, k, list(indices), (prediction, batch.cpu().tolist())))


@pytest.mark.smoke
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_what_it_returns_is_the_prediction_for_writers_and_the_list(flags: dict[str, Any]) -> None:
    expected, written = Words("batch_and_epoch"), Words("batch_and_epoch")
    loaders = [rows(11, 2), rows(6, 3), rows(1, 1)]
    stock = predict("cpu", Decoding(), loaders, callbacks=[expected])
    ours = predict(HPUInferenceAccelerator(postprocess=labels, **flags), Net(), loaders, callbacks=[written])
    assert ours == stock
    assert written.batches == expected.batches
    assert written.epoch == expected.epoch


class Ends(Callback):
    """Records the end hooks' outputs and the order of all hooks."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_batch_start(self, t: Any, m: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append((dataloader_idx, batch_idx))

    def on_predict_batch_end(
        self, t: Any, m: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.append((dataloader_idx, batch_idx, outputs, t.predict_loop.batch_progress.is_last_batch))


@pytest.mark.parametrize("flags", [{}, {"defer_hooks": False}, {"pipelining": False}], ids=str)
def test_hooks_that_stay_in_stock_order_get_it_in_place_which_is_said(
    flags: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected, seen, threads = Ends(), Ends(), set()

    def function(output: Tensor) -> list[str]:
        threads.add(threading.current_thread())
        return labels(output)

    stock = predict("cpu", Decoding(), [rows(9, 2), rows(4, 2)], callbacks=[expected])
    accelerator = HPUInferenceAccelerator(postprocess=function, **flags)
    with caplog.at_level("INFO"):
        assert predict(accelerator, Net(), [rows(9, 2), rows(4, 2)], callbacks=[seen]) == stock
    assert seen.seen == expected.seen
    assert threads == {threading.main_thread()}
    assert caplog.text.count("`postprocess` runs in place") == ("pipelining" not in flags)


def test_late_hooks_get_it_in_order_and_dataloaders_do_not_mix() -> None:
    seen, expected = Ends(), Ends()
    first_may_end = threading.Event()
    first, last = predict("cpu", Net(), rows(10, 2))[0], predict("cpu", Net(), rows(10, 2))[3]

    def function(output: Tensor) -> list[str]:
        # The first call of a dataloader ends after later ones.
        if torch.allclose(output, last):
            first_may_end.set()
        if torch.allclose(output, first):
            assert first_may_end.wait(20)
            first_may_end.clear()
        return labels(output)

    predict("cpu", Decoding(), [rows(10, 2), rows(10, 2)], callbacks=[expected])
    accelerator = HPUInferenceAccelerator(postprocess=function, defer_hooks=True)
    predict(accelerator, Net(), [rows(10, 2), rows(10, 2)], callbacks=[seen])
    ends = [call for call in seen.seen if len(call) == 4]
    assert ends == [call for call in expected.seen if len(call) == 4]
    assert seen.seen != expected.seen
    assert seen.seen.index((1, 0)) > seen.seen.index(ends[4])


def test_none_is_a_result(device: str) -> None:
    assert predict(HPUInferenceAccelerator(postprocess=lambda output: None), Net(), rows(6, 2)) == [None] * 3


def test_it_runs_where_nobody_wants_predictions() -> None:
    called = []
    ours = trainer(HPUInferenceAccelerator(postprocess=lambda output: called.append(output.device.type)))
    assert ours.predict(Net(), rows(10, 2), return_predictions=False) is None
    assert called == ["cpu"] * 5


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rule_10_batches_before_an_error_are_finished_and_the_error_names_its_batch(flags: dict[str, Any]) -> None:
    calls: list[int] = []
    expected = predict("cpu", Decoding(), rows(20, 2))
    fourth = predict("cpu", Net(), rows(20, 2))[4]

    def function(output: Tensor) -> list[str]:
        calls.append(0)
        if torch.allclose(output, fourth):
            raise Broken("no such token")
        return labels(output)

    written, threads = Words("batch"), running()
    ours = trainer(HPUInferenceAccelerator(postprocess=function, **flags), callbacks=[written])
    with pytest.raises(Broken, match="no such token") as raised:
        ours.predict(Net(), rows(20, 2))
    assert "Raised by `postprocess` of batch 4 of dataloader 0" in "".join(traceback.format_exception(raised.value))
    assert [prediction for _, _, _, (prediction, _) in written.batches] == expected[:4]
    assert running() == threads
    assert len(calls) <= 5 + 2 * 3 + 1
    assert ours.predict(Net(), rows(6, 2)) == expected[:3]


def test_rule_10_batches_before_an_error_of_the_step_are_post_processed_first() -> None:
    class Fails(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if batch_idx == 4:
                raise Broken("step 4")
            return super().predict_step(batch, batch_idx)

    written = Words("batch")
    with pytest.raises(Broken, match="step 4"):
        predict(HPUInferenceAccelerator(postprocess=labels), Fails(), rows(20, 2), callbacks=[written])
    assert [k for _, k, _, _ in written.batches] == [0, 1, 2, 3]


def test_ctrl_c_while_the_main_thread_waits_for_it() -> None:
    interrupted, threads = threading.Event(), running()

    def function(output: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread() and not interrupted.is_set():
            interrupted.set()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return output

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    ours = trainer(HPUInferenceAccelerator(postprocess=function))
    try:
        with pytest.raises(SystemExit):
            ours.predict(Net(), rows(20, 2))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from then on
    assert running() == threads
    assert len(ours.predict(Net(), rows(20, 2)) or []) == 10


def test_predictions_in_order_of_length_are_put_back() -> None:
    lengths = [3, 9, 1, 7, 2, 8, 5, 4, 6, 0]
    accelerator = HPUInferenceAccelerator(postprocess=labels, group_by_length=lengths)
    assert predict(accelerator, Net(), rows(10, 3)) == predict("cpu", Decoding(), rows(10, 3))


class Refilled:
    """A loader that fills the same memory for every batch."""

    def __init__(self) -> None:
        self.memory = torch.empty(2, 4)

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Tensor]:
        for k in range(len(self)):
            yield self.memory.copy_(Rows(12).rows[2 * k : 2 * k + 2])


class Buffered(Net):
    """Returns a buffer that it fills again in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scores", torch.zeros(2, 3))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = self.scores
        assert isinstance(scores, Tensor)
        return scores.copy_(self.net(batch))


def test_outputs_and_batches_that_are_filled_again_are_their_own() -> None:
    class Decodes(Buffered):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return labels(super().predict_step(batch, batch_idx).cpu())

    expected, seen = HookLog(), HookLog()
    stock = predict("cpu", Decodes(), Refilled(), callbacks=[expected])
    accelerator = HPUInferenceAccelerator(postprocess=labels, defer_hooks=True)
    assert predict(accelerator, Buffered(), Refilled(), callbacks=[seen]) == stock
    assert [call[3] for call in seen.named("batch_end")] == [call[3] for call in expected.named("batch_end")]


@pytest.mark.parametrize("in_flight", [0, 3])
def test_rule_9_steps_do_not_run_away_from_a_slow_function(in_flight: int) -> None:
    started: list[int] = []
    waited: list[bool] = []
    too_far = threading.Event()

    class Starts(Callback):
        def on_predict_batch_start(self, t: Any, m: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            started.append(batch_idx)
            # One is taken, and two may wait, while so many are in flight.
            if len(started) > 3 + in_flight:
                too_far.set()

    def function(output: Tensor) -> Tensor:
        if not waited:
            waited.append(too_far.wait(0.3))
        return output

    accelerator = HPUInferenceAccelerator(postprocess=function, postprocess_workers=1, in_flight=in_flight, prefetch=0)
    predict(accelerator, Net(), rows(40, 2), callbacks=[Starts()])
    assert waited == [False]
    assert len(started) == 20


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_where_the_step_changes_the_default_dtype_no_thread_is_used(precision: Any) -> None:
    seen = set()

    def function(output: Tensor) -> Tensor:
        seen.add((torch.tensor(1.0).dtype, threading.current_thread() is threading.main_thread()))
        return output

    predict(HPUInferenceAccelerator(postprocess=function), Net(), rows(10, 2), precision=precision)
    assert seen == {(torch.float32, True)}


def test_in_a_mode_of_the_main_thread_it_runs_in_that_thread(caplog: pytest.LogCaptureFixture) -> None:
    seen = set()

    def function(output: Tensor) -> Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return output

    with caplog.at_level("INFO"), torch.autocast("cpu"):
        predict(HPUInferenceAccelerator(postprocess=function), Net(), rows(10, 2))
    assert seen == {True}
    assert "`postprocess` runs in place, since `torch.autocast`" in caplog.text


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_modes_are_the_runs(inference_mode: bool) -> None:
    seen = set()

    def function(output: Tensor) -> Tensor:
        result = output * torch.ones(3, requires_grad=True)
        seen.add((result.requires_grad, result.is_inference()))
        return result

    predict(HPUInferenceAccelerator(postprocess=function), Net(), rows(10, 2), inference_mode=inference_mode)
    assert seen == {(False, inference_mode)}


def test_it_has_its_lane_in_the_report(tmp_path: Path) -> None:
    accelerator = HPUInferenceAccelerator(postprocess=labels, trace=tmp_path)
    predict(accelerator, Net(), rows(10, 2))
    assert accelerator.report is not None
    times = {(time.lane, time.stage): time.spans for time in accelerator.report.stages}
    assert times[Lane.POSTPROCESS, Stage.POSTPROCESS] == 5
    assert times[Lane.MAIN, Stage.WAIT_POSTPROCESS] == 5


def label_and_process(output: Tensor) -> list[str]:
    return [*labels(output), str(os.getpid())]


@pytest.mark.usefixtures("path_without_vision")
def test_in_processes_through_the_trainer(device: str) -> None:
    if device == "cpu":
        pytest.skip("A process takes seconds to start; the device is what could go wrong.")
    accelerator = HPUInferenceAccelerator(
        postprocess=label_and_process, postprocess_backend="process", postprocess_workers=1
    )
    ours = predict(accelerator, Net(), rows(10, 2))
    assert [labels[:-1] for labels in ours] == predict("cpu", Decoding(), rows(10, 2))
    assert len({labels[-1] for labels in ours} - {str(os.getpid())}) == 1


def test_a_function_that_cannot_be_sent_ends_the_run_before_it_begins() -> None:
    seen = HookLog()
    accelerator = HPUInferenceAccelerator(postprocess=lambda output: output, postprocess_backend="process")
    ours = trainer(accelerator, callbacks=[seen])
    with pytest.raises(TypeError, match="`postprocess_backend='thread'`"):
        ours.predict(Net(), rows(4, 2))
    assert not seen.named("batch_start")


# Without a Trainer

CONFIGS: list[dict[str, Any]] = [{}, {"in_flight": 3, "prefetch": 5}, {"postprocess_workers": 0}, {"pipelining": False}]


def pipeline(function: Callable[[Any], Any], **flags: Any) -> InferencePipeline:
    return InferencePipeline(Net().net, config=InferenceConfig(postprocess=function, **flags))


def expected(number: int) -> list[list[str]]:
    with torch.inference_mode():
        return [labels(Net().net(batch)) for batch in DataLoader(Rows(number), 1)]


@pytest.mark.parametrize("flags", CONFIGS, ids=str)
def test_a_pipeline_gives_what_it_returns_in_order(flags: dict[str, Any]) -> None:
    threads = running()
    with pipeline(labels, **flags) as ours:
        assert list(ours.predict(DataLoader(Rows(20), 1))) == expected(20)
        for batch in DataLoader(Rows(9), 1):
            ours.push(batch)
        assert len(ours) == 9
        popped = [ours.pop() for _ in range(4)]
        assert len(ours) == 5
        popped += [ours.pop() for _ in range(5)]
        assert popped == expected(9)
        with pytest.raises(IndexError, match="Nothing is in flight"):
            ours.pop()
        results = ours.predict(DataLoader(Rows(20), 1))
        assert next(results) == expected(1)[0]
        results.close()  # type: ignore[attr-defined]
    assert running() == threads


@pytest.mark.parametrize("flags", CONFIGS, ids=str)
def test_a_pipelines_error_names_the_batch(flags: dict[str, Any]) -> None:
    fourth = expected(5)[4]

    def function(output: Tensor) -> list[str]:
        if labels(output) == fourth:
            raise Broken("no such token")
        return labels(output)

    results: list[Any] = []
    with pipeline(function, **flags) as ours, pytest.raises(Broken, match="no such token") as raised:
        results.extend(ours.predict(DataLoader(Rows(20), 1)))
    assert_equal(results, expected(4))
    assert "Raised by `postprocess` of batch 4." in "".join(traceback.format_exception(raised.value))
