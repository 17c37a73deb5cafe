"""Rule 11: after any fault the first error is what the user sees, nothing is left behind, and the Trainer works."""

import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.helpers import Broken, BrokenStep, Net, Rows, Writer, assert_equal, predict, rows, running, trainer

pytestmark = pytest.mark.usefixtures("device")

FLAGS: list[dict[str, Any]] = [{}, {"in_flight": 3, "prefetch": 3}, {"defer_hooks": False}, {"pipelining": False}]


class BrokenRows(Rows):
    def __getitem__(self, index: int) -> Tensor:
        if index == 9:
            raise Broken("row 9")
        return super().__getitem__(index)


class BrokenTransfer(Net):
    hook = ""

    def _break(self, batch: Tensor) -> Tensor:
        if batch.cpu()[0, 0] == Rows(20).rows[8, 0]:
            raise Broken(self.hook)
        return batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._break(batch) if self.hook == "before" else batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        batch = self._break(batch) if self.hook == "transfer" else batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self._break(batch) if self.hook == "after" else batch


class BrokenHook(Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if self.hook == "start" and batch_idx == 4:
            raise Broken("start hook")

    def on_predict_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.hook == "end" and batch_idx == 4:
            raise Broken("end hook")


class BrokenWriter(Writer):
    def write_on_batch_end(self, *args: Any) -> None:
        raise Broken("disk full")


def fails_and_recovers(flags: dict[str, Any], module: Net, loader: Any, callbacks: list[Any]) -> None:
    """The fault surfaces as itself, no thread stays, the module is as before, and the next run is right."""
    expected = predict("cpu", Net(), rows(12, 2))
    ours = trainer(HPUInferenceAccelerator(**flags), callbacks=callbacks)
    threads = running()
    with pytest.raises(Broken) as raised:
        ours.predict(module, loader)
    assert "raise Broken" in "".join(traceback.format_tb(raised.value.__traceback__))
    assert running() == threads
    assert not any("forward" in vars(child) for child in module.modules())
    assert "predict_step" not in vars(ours.strategy)
    assert next(module.parameters()).device.type == "cpu"

    ours.callbacks = [callback for callback in ours.callbacks if callback not in callbacks]  # type: ignore[attr-defined]
    assert_equal(ours.predict(Net(), rows(12, 2)), expected)


@pytest.mark.smoke
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("fault", ["dataset", "step", "before", "transfer", "after", "start", "end", "writer"])
def test_rule_11_a_fault_surfaces_as_itself(flags: dict[str, Any], fault: str) -> None:
    module, loader, callbacks = Net(), DataLoader(Rows(20), 2), []
    if fault == "dataset":
        loader = DataLoader(BrokenRows(20), 2)
    elif fault == "step":
        module = BrokenStep()
    elif fault in ("before", "transfer", "after"):
        module = BrokenTransfer()
        module.hook = fault
    else:
        callbacks = [BrokenWriter("batch") if fault == "writer" else BrokenHook(fault)]
    fails_and_recovers(flags, module, loader, callbacks)


class Ends(Callback):
    """Fails in the end hook of a batch, if asked to."""

    def __init__(self, broken: int | None = None) -> None:
        self.ended: list[Any] = []
        self.broken = broken

    def on_predict_batch_end(self, t: Any, m: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == self.broken:
            raise Broken(f"end {batch_idx}")
        self.ended.append((batch_idx, outputs.sum().item()))


@pytest.mark.parametrize("flags", [*FLAGS, {"in_flight": 3, "defer_hooks": True}], ids=str)
@pytest.mark.parametrize("fault", ["dataset", "step", "before", "transfer", "after", "start", "interrupt"])
def test_rule_10_batches_launched_before_a_fault_are_completed_first(flags: dict[str, Any], fault: str) -> None:
    def run(accelerator: Any) -> tuple[list[Any], list[Any]]:
        ends, writer = Ends(), Writer("batch")
        module, loader, callbacks = Net(), DataLoader(Rows(20), 2), [ends, writer]
        if fault == "dataset":
            loader = DataLoader(BrokenRows(20), 2)
        elif fault == "step":
            module = BrokenStep()
        elif fault == "interrupt":
            module = Interrupted()
        elif fault == "start":
            callbacks.append(BrokenHook("start"))
        else:
            module = BrokenTransfer()
            module.hook = fault
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(SystemExit if fault == "interrupt" else Broken):
                predict(accelerator, module, loader, callbacks=callbacks)
        finally:
            signal.signal(signal.SIGINT, handler)
        return ends.ended, writer.batches

    (ends, batches), (expected, expected_batches) = run(HPUInferenceAccelerator(**flags)), run("cpu")
    assert [index for index, _ in ends] == [index for index, _ in expected] == list(range(len(expected)))
    assert [total for _, total in ends] == pytest.approx([total for _, total in expected])
    assert_equal(batches, expected_batches)


def test_rule_10_if_completing_fails_too_the_first_error_is_what_the_user_sees() -> None:
    accelerator = HPUInferenceAccelerator(in_flight=2, defer_hooks=True)
    with pytest.raises(Broken, match="step 4") as raised:
        predict(accelerator, BrokenStep(), rows(20, 2), callbacks=[ends := Ends(broken=3)])
    assert [index for index, _ in ends.ended] == [0, 1, 2]
    assert str(raised.value.__context__) == "end 3"


class Unfetched:
    """An output that cannot be moved to the host, of one batch."""

    def __init__(self, scores: Tensor, fails: bool) -> None:
        self.scores, self.fails = scores, fails

    def to(self, device: Any) -> "Unfetched":
        if self.fails:
            raise Broken("not moved")
        return Unfetched(self.scores.to(device), fails=False)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("flags", [{}, {"postprocess_workers": 0}, {"in_flight": 3}], ids=str)
def test_rule_10_an_output_that_cannot_be_fetched_loses_none_before_it(flags: dict[str, Any]) -> None:
    class Step(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return Unfetched(self.net(batch), fails=batch_idx == 6)

    accelerator = HPUInferenceAccelerator(postprocess=lambda output: output.scores, **flags)
    writer, expected = Writer("batch"), Writer("batch")
    with pytest.raises(Broken, match="not moved"):
        predict(accelerator, Step(), rows(20, 2), callbacks=[writer])
    predict("cpu", Net(), rows(12, 2), callbacks=[expected])
    assert_equal(writer.batches, expected.batches)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rule_10_a_fault_in_an_end_hook_ends_the_run_where_stock_lightning_ends(flags: dict[str, Any]) -> None:
    (ends := Ends(broken=4)), (expected := Ends(broken=4))
    for accelerator, callback in ((HPUInferenceAccelerator(**flags), ends), ("cpu", expected)):
        with pytest.raises(Broken, match="end 4"):
            predict(accelerator, Net(), rows(20, 2), callbacks=[callback])
    assert [index for index, _ in ends.ended] == [index for index, _ in expected.ended] == [0, 1, 2, 3]


class Interrupted(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 3:
            signal.raise_signal(signal.SIGINT)
        return super().predict_step(batch, batch_idx)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rule_11_ctrl_c(flags: dict[str, Any]) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    ours = trainer(HPUInferenceAccelerator(**flags))
    threads = running()
    try:
        with pytest.raises(SystemExit):
            ours.predict(Interrupted(), rows(20, 2))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from then on
    assert running() == threads
    assert len(ours.predict(Net(), rows(20, 2)) or []) == 10


def test_rule_11_ctrl_c_while_waiting_for_the_dataset() -> None:
    waiting = threading.Event()

    class Slow(Rows):
        def __getitem__(self, index: int) -> Tensor:
            if index == 6:
                waiting.set()
                interrupted.wait(20)
            return super().__getitem__(index)

    interrupted = threading.Event()

    def press() -> None:
        assert waiting.wait(20)
        main = threading.main_thread().ident or 0
        still, place = 0, None
        # Before it waits, it may be in a finalizer, which swallows the interrupt.
        while still < 50:
            frame = sys._current_frames()[main]
            now = frame.f_code, frame.f_lasti
            waits = Path(frame.f_code.co_filename).name in ("prefetch.py", "threading.py")
            still, place = still + 1 if waits and now == place else 0, now
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)
        interrupted.set()

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    finger = threading.Thread(target=press)
    finger.start()
    try:
        with pytest.raises(SystemExit):
            predict(HPUInferenceAccelerator(), Net(), DataLoader(Slow(20), 2))
    finally:
        finger.join()
        signal.signal(signal.SIGINT, handler)
