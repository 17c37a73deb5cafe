"""Outputs that are copied to pinned memory without waiting: as right as those that are waited for."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline, emulator
from tests.helpers import Broken, BrokenStep, Net, assert_like_stock, predict, rows, trainer

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


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("module", [Net, Various, Convolution])
def test_predictions_equal_stock(flags: dict[str, Any], module: type[Net]) -> None:
    assert_like_stock(HPUInferenceAccelerator(async_output=True, **flags), module(), rows(21, 2))


def test_rule_9_copies_to_the_host_do_not_wait_where_asked() -> None:
    emulator.reset_stats()
    predict(HPUInferenceAccelerator(async_output=True), Net(), rows(12, 2))
    assert emulator.stats().d2h_non_blocking == 6


def test_launching_goes_on_while_nothing_is_copied() -> None:
    module = Net()
    with InferencePipeline(module.net, config=InferenceConfig(async_output=True, hpu_graphs=False)) as pipeline:
        with emulator.paused("d2h"):
            for batch in rows(12, 2):
                pipeline.push(batch)
            assert emulator.stats().d2h_non_blocking == 6
        found = [pipeline.pop() for _ in range(6)]
    torch.testing.assert_close(torch.cat(found), module.cpu().net(torch.cat(list(rows(12, 2)))))


class Look(Callback):
    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_predict_batch_end(self, _: Any, __: Any, outputs: Any, *args: Any) -> None:
        self.outputs.append(outputs)


def test_rule_8_what_is_kept_is_not_pinned_and_stays() -> None:
    look = Look()
    predictions = trainer(HPUInferenceAccelerator(async_output=True), [look]).predict(Net(), rows(12, 2))
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
