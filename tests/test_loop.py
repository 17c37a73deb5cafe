"""The rules of the pipelined loop, compared with stock Lightning in the same process."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.helpers import ALL_OFF, HookLog, Net, Rows, Writer, assert_equal, assert_like_stock, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("device")

FLAGS: list[dict[str, Any]] = [
    {},
    ALL_OFF,
    {"hpu_graphs": False},
    {"async_copy": False},
    {"pipelining": False},
    {"prefetch": 0},
    {"in_flight": 0},
    {"in_flight": 3, "prefetch": 5},
    {"defer_hooks": False},
    {"defer_hooks": False, "in_flight": 4},
]


@pytest.mark.smoke
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rule_1_predictions_equal_stock(flags: dict[str, Any]) -> None:
    assert_like_stock(HPUInferenceAccelerator(**flags), Net(), rows(11, 2))


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rule_1_several_dataloaders(flags: dict[str, Any]) -> None:
    assert_like_stock(HPUInferenceAccelerator(**flags), Net(), [rows(5, 2), rows(6, 3), rows(1, 1)])


class Nested(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 2:
            return None
        scores = self.net(batch["x"])
        return {"scores": scores, "parts": [scores[:, 0], (batch["name"], batch_idx)], "input": batch["x"]}


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rule_1_nested_outputs_strings_and_none(flags: dict[str, Any]) -> None:
    data = [{"x": row, "name": f"row {i}"} for i, row in enumerate(Rows(9).rows)]
    with pytest.warns(UserWarning, match="predict returned None"):
        assert_like_stock(HPUInferenceAccelerator(**flags), Nested(), DataLoader(data, 2))  # type: ignore[arg-type]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(Rows(7).rows)


@pytest.mark.parametrize("flags", [{}, {"prefetch": 5, "in_flight": 5}, {"pipelining": False}], ids=str)
def test_rule_1_an_iterable_dataset_without_length(flags: dict[str, Any]) -> None:
    log, expected = HookLog(), HookLog()
    predict("cpu", Net(), DataLoader(Stream(), 2), callbacks=[expected])
    predict(HPUInferenceAccelerator(**flags), Net(), DataLoader(Stream(), 2), callbacks=[log])
    assert log.named("batch_end") == expected.named("batch_end")
    assert log.named("batch_end")[-1][4] is True  # is_last_batch


@pytest.mark.parametrize("limit", [0, 2, 0.5, 100])
def test_rule_1_limit_predict_batches(limit: float) -> None:
    assert_like_stock(HPUInferenceAccelerator(), Net(), [rows(8, 2), rows(4, 2)], limit_predict_batches=limit)


@pytest.mark.smoke
@pytest.mark.parametrize("flags", [{"pipelining": False}, ALL_OFF, {"in_flight": 0, "prefetch": 0}], ids=str)
def test_rule_1_without_pipelining_the_hook_sequence_is_stock(flags: dict[str, Any]) -> None:
    log, expected = HookLog(), HookLog()
    predict("cpu", Net(), [rows(5, 2), rows(4, 2)], callbacks=[expected])
    predict(HPUInferenceAccelerator(**flags), Net(), [rows(5, 2), rows(4, 2)], callbacks=[log])
    assert log.calls == expected.calls


def test_rule_1_without_deferred_hooks_the_sequence_is_stock() -> None:
    log, expected = HookLog(), HookLog()
    predict("cpu", Net(), rows(9, 2), callbacks=[expected])
    predict(HPUInferenceAccelerator(defer_hooks=False, in_flight=2), Net(), rows(9, 2), callbacks=[log])
    assert log.calls == expected.calls


@pytest.mark.parametrize(
    ("in_flight", "order"),
    [
        (1, "s0 s1 e0 s2 e1 s3 e2 s4 e3 e4"),
        (2, "s0 s1 s2 e0 s3 e1 s4 e2 e3 e4"),
        (9, "s0 s1 s2 s3 s4 e0 e1 e2 e3 e4"),
    ],
)
def test_rule_1_deferred_hooks_stay_in_order(in_flight: int, order: str) -> None:
    log = HookLog()
    accelerator = HPUInferenceAccelerator(in_flight=in_flight, defer_hooks=True)
    predict(accelerator, Net(), rows(10, 2), callbacks=[log])
    assert log.order == order
    assert [call[0] for call in log.calls[:2] + log.calls[-2:]] == ["start", "epoch_start", "epoch_end", "end"]


def test_rule_1_deferred_end_hooks_see_their_own_batch() -> None:
    log, expected = HookLog(), HookLog()
    loaders = [rows(8, 2), rows(3, 1)]
    for accelerator, callback in (("cpu", expected), (HPUInferenceAccelerator(in_flight=3, defer_hooks=True), log)):
        ours = trainer(accelerator, callbacks=[callback])
        ours.predict(Net(), loaders)
        ours.predict(Net(), loaders)
    # Batch, indices, `is_last_batch`, counters of this run and of both runs.
    assert log.named("batch_end") == expected.named("batch_end")
    assert log.named("batch_start") == expected.named("batch_start")


def test_rule_1_pipelining_drains_between_dataloaders() -> None:
    log = HookLog()
    accelerator = HPUInferenceAccelerator(in_flight=4, defer_hooks=True)
    predict(accelerator, Net(), [rows(4, 2), rows(4, 2)], callbacks=[log])
    loaders = [call[1] for call in log.named("batch_start", "batch_end")]
    assert loaders == sorted(loaders)


@pytest.mark.smoke
@pytest.mark.parametrize("flags", [{}, {"in_flight": 4, "prefetch": 4}, {"defer_hooks": False}], ids=str)
@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
@pytest.mark.parametrize("returned", [True, False])
def test_rule_1_writers_see_their_own_indices(flags: dict[str, Any], interval: str, returned: bool) -> None:
    writer, expected = Writer(interval), Writer(interval)
    for accelerator, callback in (("cpu", expected), (HPUInferenceAccelerator(**flags), writer)):
        trainer(accelerator, callbacks=[callback]).predict(Net(), rows(11, 3), return_predictions=returned)
    assert_equal(writer.batches, expected.batches)
    assert_equal(writer.epoch, expected.epoch)


def test_rule_1_return_predictions_false_returns_none() -> None:
    assert trainer(HPUInferenceAccelerator()).predict(Net(), rows(), return_predictions=False) is None


def test_rule_1_the_same_trainer_predicts_again() -> None:
    ours, module = trainer(HPUInferenceAccelerator()), Net()
    first = ours.predict(module, rows())
    assert_equal(ours.predict(module, rows()), first)
    assert "forward" not in vars(module.net)
    assert next(module.parameters()).device.type == "cpu"


class OwnTransfer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append("before")
        return batch + 1

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.seen.append("transfer")
        return super().transfer_batch_to_device(batch * 2, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(f"after on {batch.device.type}")
        return batch - 3


def test_rule_1_overridden_transfer_hooks() -> None:
    module = OwnTransfer()
    ours = assert_like_stock(HPUInferenceAccelerator(), module, rows(8, 2))
    stock, pipelined = module.seen[:12], module.seen[12:]
    assert stock == ["before", "transfer", "after on cpu"] * 4
    device = ours.strategy.root_device.type
    assert [call for call in pipelined if call != "before"] == ["transfer", f"after on {device}"] * 4
    assert pipelined.count("before") == 4


class PullsBatches(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net().net

    def predict_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.net(batch.to(self.device))


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument", "ignore:You are using the `dataloader_iter`")
def test_rule_1_a_step_that_pulls_its_batches_gets_the_stock_loop() -> None:
    assert_like_stock(HPUInferenceAccelerator(), PullsBatches(), rows(8, 2))


class Stops(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 3:
            raise StopIteration
        return super().predict_step(batch, batch_idx)


def test_rule_1_a_step_that_raises_stop_iteration_ends_the_run_quietly() -> None:
    assert_like_stock(HPUInferenceAccelerator(in_flight=2), Stops(), rows(10, 2))


def test_deferred_end_hooks_get_host_tensors_and_stock_order_device_tensors(device: str) -> None:
    class Outputs(Callback):
        def on_predict_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any, **_: Any) -> None:
            devices.append(outputs.device.type)

    for defer, expected in ((True, "cpu"), (False, "hpu" if device == "emulator" else "cpu")):
        devices: list[str] = []
        predict(HPUInferenceAccelerator(defer_hooks=defer), Net(), rows(4, 2), callbacks=[Outputs()])
        assert devices == [expected] * 2


def test_stock_profiler_spans_stay() -> None:
    spans = []
    for accelerator in ("cpu", HPUInferenceAccelerator()):
        ours = trainer(accelerator, profiler="simple")
        ours.predict(Net(), rows(4, 2))
        durations = ours.profiler.recorded_durations  # type: ignore[attr-defined]
        # A strategy's spans bear the name of its class.
        strategy = type(ours.strategy).__name__
        spans.append({name.replace(strategy, "Strategy"): len(times) for name, times in durations.items()})
    assert spans[1] == spans[0]
