"""`stream` yields what `trainer.predict` returns, while it is predicted."""

import copy
import gc
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter, stream, streaming
from lightning_hpu_infer.writing.read import read_predictions
from tests.helpers import Net, assert_equal, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("device")
FLAGS: list[dict[str, Any]] = [{}, {"in_flight": 4, "prefetch": 3}, {"pipelining": False}, {"defer_hooks": False}]


class Counted(Net):
    """Counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.stepped = threading.Condition()

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        with self.stepped:
            self.steps += 1
            self.stepped.notify_all()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "stepped"}


def left_behind() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hpu-infer")]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_it_yields_what_predict_returns_in_order(flags: dict[str, Any]) -> None:
    loaders = [rows(10, 3), rows(5, 2)]
    expected = [batch for loader in predict("cpu", Net(), loaders) for batch in loader]
    ours: Any = trainer(HPUInferenceAccelerator(**flags))
    callbacks = list(ours.callbacks)
    for _ in range(2):
        assert_equal(list(stream(ours, Net(), loaders)), expected)
    assert ours.callbacks == callbacks
    assert left_behind() == []


def test_with_stock_lightning_too() -> None:
    assert_equal(list(stream(trainer("cpu"), Net(), rows(10, 3))), predict("cpu", Net(), rows(10, 3)))


def test_a_prediction_is_there_before_later_batches_are_fetched() -> None:
    """The dataset waits for the caller, who waits for the first prediction."""
    seen = threading.Event()

    class Waits(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> torch.Tensor:
            assert i == 0 or seen.wait(60)
            return torch.full((4,), float(i))

    accelerator = HPUInferenceAccelerator(in_flight=0, prefetch=0)
    for _ in stream(trainer(accelerator), Net(), DataLoader(Waits())):
        seen.set()


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rule_9_what_waits_for_the_caller_is_bounded(flags: dict[str, Any]) -> None:
    net, most = Counted(), 2
    predictions = stream(trainer(HPUInferenceAccelerator(**flags)), net, rows(60, 2), max_pending=most)
    next(predictions)
    bound = 1 + most + 1 + flags.get("in_flight", 8) + 1
    with net.stepped:
        assert net.stepped.wait_for(lambda: net.steps >= most + 2, 60)
        assert net.steps <= bound
    assert len(list(predictions)) == 29
    assert net.steps == 30


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_leaving_the_loop_ends_the_run(flags: dict[str, Any], taken: int) -> None:
    ours = trainer(HPUInferenceAccelerator(**flags))
    predictions = stream(ours, Net(), rows(40, 2))
    for _ in range(taken):
        next(predictions)
    predictions.close()  # type: ignore[attr-defined]
    assert left_behind() == []
    assert_equal(ours.predict(Net(), rows(10, 3)), predict("cpu", Net(), rows(10, 3)))


def test_a_generator_that_is_forgotten_ends_the_run() -> None:
    next(stream(trainer(HPUInferenceAccelerator()), Net(), rows(40, 2)))
    gc.collect()
    assert left_behind() == []


def test_an_error_comes_after_the_predictions_before_it() -> None:
    class Fails(Net):
        def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            if batch_idx == 3:
                raise ValueError("in the fourth")

    taken: list[Any] = []
    predictions = stream(trainer(HPUInferenceAccelerator(in_flight=2)), Fails(), rows(40, 2))
    with pytest.raises(ValueError, match="in the fourth"):
        taken.extend(predictions)
    assert_equal(taken, predict("cpu", Net(), rows(40, 2))[:3])
    assert left_behind() == []


def test_an_error_of_the_callers_ends_the_run() -> None:
    def interrupted() -> None:
        for _ in stream(trainer(HPUInferenceAccelerator()), Net(), rows(40, 2)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.collect()
    assert left_behind() == []


def test_callbacks_are_told_that_a_run_was_left(tmp_path: Any) -> None:
    writer = PredictionWriter(tmp_path)
    ours = trainer(HPUInferenceAccelerator(in_flight=0), [writer])
    predictions = stream(ours, Net(), rows(40, 2), max_pending=1)
    next(predictions)
    predictions.close()  # type: ignore[attr-defined]
    found = read_predictions(tmp_path)["index"].to_pylist()
    assert 2 <= len(found) < 40
    assert found == list(range(len(found)))
    ours.predict(Net(), rows(40, 2))
    assert read_predictions(tmp_path)["index"].to_pylist() == list(range(40))


def test_rule_11_a_second_ctrl_c_leaves_nothing_on_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: Any = trainer(HPUInferenceAccelerator())
    callbacks = list(ours.callbacks)
    wait_for = streaming._wait_for

    def interrupted(thread: threading.Thread) -> None:
        wait_for(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_wait_for", interrupted)
    predictions = stream(ours, Net(), rows(40, 2))
    next(predictions)
    with pytest.raises(KeyboardInterrupt):
        predictions.close()  # type: ignore[attr-defined]
    assert ours.callbacks == callbacks


class Sevens(Net):
    """Predicts something else."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch) * 0 + 7


ACCELERATORS: list[Any] = ["cpu", HPUInferenceAccelerator]
RUNS = ("fit", "validate", "test", "predict")


def made(accelerator: Any, **flags: Any) -> Any:
    return trainer(accelerator if isinstance(accelerator, str) else accelerator(**flags))


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_a_trainer_that_streams_refuses_other_runs_and_goes_on_unharmed(accelerator: Any, run: str) -> None:
    ours = made(accelerator)
    attributes, callbacks = set(vars(ours)), list(ours.callbacks)
    taken = []
    for prediction in stream(ours, Net(), rows(12, 2)):
        taken.append(prediction)
        with pytest.raises(RuntimeError, match="in a `stream` that has not ended"):  # in the last turn too
            getattr(ours, run)(Sevens(), rows(4, 2))
    assert_equal(taken, predict("cpu", Net(), rows(12, 2)))
    assert set(vars(ours)) == attributes
    assert ours.callbacks == callbacks
    assert_equal(ours.predict(Sevens(), rows(4, 2)), predict("cpu", Sevens(), rows(4, 2)))


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
@pytest.mark.parametrize("shared", ["trainer", "module"])
def test_a_second_stream_of_the_same_is_refused(accelerator: Any, shared: str) -> None:
    ours, net = made(accelerator), Net()
    first = stream(ours, net, rows(12, 2))
    second = stream(*((ours, Sevens()) if shared == "trainer" else (made(accelerator), net)), rows(12, 2))
    taken = [next(first)]
    with pytest.raises(RuntimeError, match="in a `stream` that has not ended"):
        next(second)
    assert_equal([*taken, *first], predict("cpu", Net(), rows(12, 2)))
    assert left_behind() == []


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
def test_a_trainer_of_an_iterator_that_is_kept_is_free_once_it_is_closed(accelerator: Any) -> None:
    ours = made(accelerator)
    kept: Any = stream(ours, Net(), rows(40, 2))
    next(kept)
    with pytest.raises(RuntimeError, match="in a `stream` that has not ended"):
        ours.predict(Sevens(), rows(4, 2))
    kept.close()
    assert_equal(ours.predict(Sevens(), rows(4, 2)), predict("cpu", Sevens(), rows(4, 2)))


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
def test_a_module_that_another_trainer_has_run_ends_the_stream(accelerator: Any) -> None:
    net = Net()
    flags = {} if accelerator == "cpu" else {"hpu_graphs": False}
    predictions = stream(made(accelerator, **flags), net, rows(80, 2), max_pending=1)
    taken = [next(predictions)]
    with suppress(RuntimeError):  # Either run may fail: both move the module.
        made(accelerator, **flags).predict(net, rows(4, 2))
    with pytest.raises(RuntimeError):
        taken.extend(predictions)
    assert len(taken) < 40
    assert_equal(taken, predict("cpu", Net(), rows(80, 2))[: len(taken)])


@pytest.mark.parametrize("accelerator", ACCELERATORS, ids=str)
def test_another_trainer_with_a_copy_predicts_inside_of_the_loop(accelerator: Any) -> None:
    net = Net()
    other, copied = made(accelerator), copy.deepcopy(net)
    taken = []
    for prediction in stream(made(accelerator), net, rows(6, 2)):
        taken.append(prediction)
        assert_equal(other.predict(copied, rows(4, 2)), predict("cpu", Net(), rows(4, 2)))
    assert_equal(taken, predict("cpu", Net(), rows(6, 2)))


def test_a_run_that_is_left_behind_keeps_its_trainer_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    class Waits(Net):
        def on_predict_end(self) -> None:
            go_on.wait(60)

    def interrupted(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "_wait_for", interrupted)
    ours = made("cpu")
    predictions: Any = stream(ours, Waits(), rows(4, 2))
    taken = [next(predictions), next(predictions)]
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "hpu-infer-stream")
    with pytest.raises(KeyboardInterrupt):
        predictions.close()
    with pytest.raises(RuntimeError, match="in a `stream` that has not ended"):
        ours.predict(Sevens(), rows(4, 2))
    go_on.set()
    thread.join()
    assert_equal(taken, predict("cpu", Net(), rows(4, 2)))
    assert_equal(ours.predict(Sevens(), rows(4, 2)), predict("cpu", Sevens(), rows(4, 2)))


def test_predictions_are_the_callers_to_change() -> None:
    class Reuses(Net):
        def __init__(self) -> None:
            super().__init__()
            self.buffer: Any = None

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            found = self.net(batch)
            self.buffer = found if self.buffer is None else self.buffer.copy_(found)
            return self.buffer

    taken = []
    for prediction in stream(trainer(HPUInferenceAccelerator()), Reuses(), rows(12, 2)):
        taken.append(prediction.clone())
        with torch.inference_mode():
            prediction.fill_(-1)
    assert_equal(taken, predict("cpu", Net(), rows(12, 2)))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "mode",
    [lambda: torch.autocast("cpu"), lambda: torch.autocast("hpu"), lambda: torch.device("meta")],
    ids=["autocast", "autocast of the device", "default device"],
)
def test_modes_that_the_thread_would_not_have_are_refused_where_the_run_begins(mode: Any) -> None:
    ours = trainer(HPUInferenceAccelerator())
    predictions = stream(ours, Net(), rows(4, 2))
    for begin in (lambda: next(predictions), lambda: stream(ours, Net(), rows(4, 2))):
        with pytest.raises(RuntimeError, match="Pass `precision` to the Trainer"), mode():
            begin()
    assert_equal(list(stream(ours, Net(), rows(4, 2))), predict("cpu", Net(), rows(4, 2)))


def test_what_it_cannot_do_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="`max_pending` must be positive, got 0"):
        stream(trainer(HPUInferenceAccelerator()), Net(), rows(4, 2), max_pending=0)
    with pytest.raises(MisconfigurationException, match="Pass `group_by_length=None`"):
        stream(trainer(HPUInferenceAccelerator(group_by_length=len)), Net(), rows(4, 2))
    with pytest.raises(RuntimeError, match="Pass `precision` to the Trainer"), torch.autocast("cpu"):
        stream(trainer(HPUInferenceAccelerator()), Net(), rows(4, 2))
    with pytest.raises(MisconfigurationException, match="starts others"):
        stream(trainer("cpu", strategy="ddp_spawn", devices=2), Net(), rows(4, 2))
