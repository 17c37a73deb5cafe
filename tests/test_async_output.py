"""Outputs that are copied to pinned memory without waiting: as right as those that are waited for."""

import threading
import time
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline, _habana, emulator
from lightning_hpu_infer.nested import map_tensors
from lightning_hpu_infer.transfer import AsyncOutputs, PendingOutput
from tests.helpers import Broken, BrokenStep, Net, assert_equal, assert_like_stock, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("emulated")

FLAGS: list[dict[str, Any]] = [{}, {"in_flight": 3}, {"hpu_graphs": False}, {"defer_hooks": False}]


class Various(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = self.net(batch)
        best = scores.argmax(1)  # 64 bit: the bridge waits for its copy
        return {"scores": scores, "again": [scores, scores.t()], "best": best, "none": None, "empty": scores[:0]}


class Convolution(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 2, 1)  # type: ignore[assignment]

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch[:, None, None])


class OfEveryRank(Net):
    """Outputs whose bytes the device may keep in another order, each with one after it that hides the error."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = self.net(batch)
        cube = torch.stack([scores, scores + 1])
        return [scores.mean(), scores[0], scores, cube, cube[:, :, 1], cube.bool(), cube.bfloat16(), scores > 0]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("module", [Net, Various, Convolution, OfEveryRank])
def test_predictions_equal_stock(flags: dict[str, Any], module: type[Net]) -> None:
    assert_like_stock(HPUInferenceAccelerator(async_output=True, **flags), module(), rows(21, 2))


def test_rule_9_copies_to_the_host_do_not_wait_where_asked() -> None:
    emulator.reset_stats()
    predict(HPUInferenceAccelerator(async_output=True), Net(), rows(12, 2))
    assert emulator.stats().d2h_non_blocking == 6


class OneOutput(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch)


class OfOneKind(Net):
    """Outputs of one dtype and rank, of which only the first ones are compared."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = self.net(batch)
        return {"scores": scores, "twice": 2 * scores, "thrice": 3 * scores}


@pytest.mark.parametrize("module", [OneOutput, OfOneKind, OfEveryRank])
@pytest.mark.parametrize("in_flight", [1, 3])
def test_a_bridge_that_permutes_what_is_copied_is_noticed(
    module: type[Net], in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The error of a permuted copy comes out where it is the last of its batch, and is lost elsewhere.
    monkeypatch.setattr(AsyncOutputs, "snapshot", lambda self, tensor: tensor.clone())
    accelerator = HPUInferenceAccelerator(async_output=True, in_flight=in_flight)
    with pytest.warns(UserWarning, match="Copying outputs to the host without waiting went wrong") as warned:
        assert_like_stock(accelerator, module(), rows(21, 2))
    assert len([warning for warning in warned if "without waiting went wrong" in str(warning.message)]) == 1


def test_the_first_copies_of_each_kind_are_compared_and_later_ones_are_not() -> None:
    copies = []
    for async_output in (True, False):
        emulator.reset_stats()
        predict(HPUInferenceAccelerator(async_output=async_output, hpu_graphs=False), OneOutput(), rows(12, 2))
        copies.append((emulator.stats().d2h_copies, emulator.stats().d2h_non_blocking))
    (found, non_blocking), (waited, _) = copies
    assert (found - waited, non_blocking) == (AsyncOutputs.VERIFIED, 6)


class Reuses(Net):
    """A step that returns memory and containers of its own, which the next step fills again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scores", torch.zeros(2, 3))
        self.result: dict[str, Any] = {}
        self.made: Any = None

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = self.net(batch)
        if self.made is None:
            self.made = torch.empty_like(scores), torch.empty_like(scores.argmax(1)), scores.new_zeros(3, device="cpu")
        for memory, value in zip(
            (self.scores, *self.made), (scores, scores + 1, scores.argmax(1), scores[0].cpu()), strict=True
        ):
            memory.copy_(value)
        self.result |= {"scores": self.scores, "made": list(self.made), "index": batch_idx}
        return self.result


class Seen(Callback):
    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_predict_batch_end(self, _: Any, __: Any, outputs: Any, *args: Any) -> None:
        self.outputs.append(move_data_to_device(map_tensors(Tensor.clone, outputs, copies=True), torch.device("cpu")))


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize(
    "flags", [*FLAGS, {"async_output": False}, {"async_output": False, "in_flight": 3, "hpu_graphs": False}], ids=str
)
def test_rule_7_a_step_may_return_memory_and_containers_that_it_fills_again(
    flags: dict[str, Any], inference_mode: bool
) -> None:
    def run(**flags: Any) -> tuple[Any, list[Any]]:
        seen = Seen()
        accelerator = HPUInferenceAccelerator(**flags)
        found = trainer(accelerator, [seen], inference_mode=inference_mode).predict(Reuses(), rows(12, 2))
        return found, seen.outputs

    def host(outputs: list[Any]) -> Any:
        # A host tensor that is filled again is one object in all predictions of stock Lightning.
        return [{**output, "made": output["made"][:2]} for output in outputs]

    expected, seen = run(hpu_graphs=False, async_copy=False, pipelining=False)
    found, seen_late = run(**{"async_output": True} | flags)
    assert_equal(host(found), host(expected))
    assert_equal(seen_late, seen)


def test_launching_goes_on_while_nothing_is_copied() -> None:
    all_are_there = threading.Event()

    class Held(Net):
        def predict_step(self, *args: Any) -> Any:
            assert all_are_there.wait(60)
            return super().predict_step(*args)

    module, config = Held(), InferenceConfig(async_output=True, hpu_graphs=False, in_flight=6)
    with InferencePipeline(module, config=config) as pipeline:
        with emulator.paused("d2h"):
            for batch in rows(12, 2):
                pipeline.push(batch)
            all_are_there.set()
            ends = time.monotonic() + 60
            while emulator.stats().d2h_non_blocking < 6 and time.monotonic() < ends:
                time.sleep(0.001)
            assert emulator.stats().d2h_non_blocking == 6
        found = [pipeline.pop() for _ in range(6)]
    torch.testing.assert_close(torch.cat(found), module.cpu().net(torch.cat(list(rows(12, 2)))))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.int32])
def test_an_output_does_not_wait_for_copies_of_a_later_one(dtype: torch.dtype) -> None:
    """Copies to the host run in order: one that is waited for must not stand behind one of a later batch."""
    outputs, device = AsyncOutputs(), torch.device("hpu", 0)

    def launched() -> PendingOutput:
        scores = torch.ones(2, 3, device=device) * 2
        return PendingOutput({"scores": scores, "best": scores.to(dtype)}, device, asynchronous=outputs)

    for _ in range(AsyncOutputs.VERIFIED):
        launched().result()
    first = launched()
    _habana.synchronize()
    held = emulator.paused("compute")
    held.__enter__()
    gives_up = threading.Timer(20, held.__exit__, (None, None, None))
    gives_up.start()
    later = launched()
    found = first.result()
    assert gives_up.is_alive()
    gives_up.cancel()
    gives_up.join()
    held.__exit__(None, None, None)
    expected = {"scores": torch.full((2, 3), 2.0), "best": torch.full((2, 3), 2, dtype=dtype)}
    assert_equal([found, later.result()], [expected, expected])


class Look(Callback):
    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_predict_batch_end(self, _: Any, __: Any, outputs: Any, *args: Any) -> None:
        self.outputs.append(outputs)


def test_rule_8_what_is_kept_is_not_pinned_and_stays() -> None:
    look = Look()
    predictions = trainer(HPUInferenceAccelerator(async_output=True, defer_hooks=True), [look]).predict(
        Net(), rows(12, 2)
    )
    assert predictions is not None
    for seen, kept in zip(look.outputs, predictions, strict=True):
        assert seen.device.type == "cpu"
        assert not seen.is_pinned("hpu")
        torch.testing.assert_close(seen, kept)
    assert len({seen.data_ptr() for seen in look.outputs}) == 6


def test_rule_8_after_an_error_no_copy_is_under_way() -> None:
    ours = trainer(HPUInferenceAccelerator(async_output=True, in_flight=3))
    with pytest.raises(Broken, match="step 4"):
        ours.predict(BrokenStep(), rows(12, 2))
    assert len(ours.predict(Net(), rows(12, 2)) or []) == 6


class OutOfRange(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.table(torch.full((2,), batch_idx, dtype=torch.int32, device=batch.device))


def test_an_error_on_the_device_comes_out() -> None:
    with pytest.raises(IndexError, match="out of range"):
        predict(HPUInferenceAccelerator(async_output=True, hpu_graphs=False), OutOfRange(), rows(12, 2))
