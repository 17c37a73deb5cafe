"""Steps, hooks and `postprocess` see each batch and output as it was, whatever objects are filled again."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline
from tests.helpers import predict, rows, trainer
from tests.objects import CASES, TRUTH, batches_of, read


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return batches_of(CASES)


class Items(Dataset[Any]):
    def __init__(self) -> None:
        self.batches = batches_of(CASES)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return next(self.batches)


class Reads(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Any:
        return read(CASES, batch)

    forward = predict_step


FLAGS: list[dict[str, Any]] = [{}, {"prefetch": 4, "in_flight": 3}, {"async_copy": False}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_rule_7_objects_that_a_loader_fills_again(flags: dict[str, Any], device: str) -> None:
    accelerator = HPUInferenceAccelerator(**flags)
    assert predict(accelerator, Reads(), DataLoader(Items(), batch_size=None)) == TRUTH
    loader = DataLoader(Stream(), batch_size=None, collate_fn=lambda batch: batch)
    # Lightning itself is one batch ahead where it cannot know which is the last one.
    assert predict(accelerator, Reads(), loader) == predict("cpu", Reads(), loader) == [*TRUTH[1:], TRUTH[-1]]


@pytest.mark.parametrize("flags", FLAGS[:2], ids=str)
def test_rule_7_objects_that_are_filled_again_without_a_trainer(flags: dict[str, Any], device: str) -> None:
    with InferencePipeline(Reads(), config=InferenceConfig(hpu_graphs=False, **flags)) as pipeline:
        assert list(pipeline.predict(batches_of(CASES))) == TRUTH


def test_rule_7_an_object_may_be_filled_again_once_submit_has_returned(device: str) -> None:
    opened = threading.Event()

    class Waits(Reads):
        def forward(self, batch: Any, batch_idx: int = 0) -> Any:
            assert opened.wait(60)
            return read(CASES, batch)

    with InferencePipeline(Waits(), config=InferenceConfig(hpu_graphs=False)) as pipeline:
        futures = [pipeline.submit(batch) for batch in batches_of(CASES)]
        opened.set()
        assert [future.result(60) for future in futures] == TRUTH


class Returns(LightningModule):
    """A step that returns one object again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.results = batches_of(CASES)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Any:
        result = next(self.results)
        result.scores = self.net(batch)
        return result

    forward = predict_step


class Sees(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_predict_batch_end(self, _: Any, __: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(read(CASES, outputs))


def seen(accelerator: Any, **kwargs: Any) -> Any:
    sees = Sees()
    trainer(accelerator, [sees]).predict(Returns(), rows(12, 2), **kwargs)
    return sees.seen


OUTPUTS: list[dict[str, Any]] = [{"defer_hooks": True}, {"defer_hooks": True, "in_flight": 3}, {"async_output": False}]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize("flags", OUTPUTS, ids=str)
def test_rule_7_late_hooks_see_what_a_step_returned(flags: dict[str, Any], kept: bool, device: str) -> None:
    assert seen("cpu", return_predictions=kept) == TRUTH
    assert seen(HPUInferenceAccelerator(**flags), return_predictions=kept) == TRUTH


def test_rule_7_predictions_are_what_each_step_returned(emulated: None) -> None:
    predictions = predict(HPUInferenceAccelerator(), Returns(), rows(12, 2))
    assert [read(CASES, prediction) for prediction in predictions] == TRUTH


@pytest.mark.parametrize("workers", [0, 2])
def test_rule_7_postprocess_gets_what_each_step_returned(workers: int, device: str) -> None:
    all_are_there = threading.Event()

    def postprocess(output: Any) -> Any:
        all_are_there.wait(0.01 if workers else 0)  # later steps run meanwhile, if they may
        return read(CASES, output)

    options: dict[str, Any] = {"postprocess": postprocess, "postprocess_workers": workers}
    assert predict(HPUInferenceAccelerator(**options), Returns(), rows(12, 2)) == TRUTH
    with InferencePipeline(Returns(), config=InferenceConfig(hpu_graphs=False, **options)) as pipeline:
        futures = [pipeline.submit(batch) for batch in rows(12, 2)]
        assert [future.result(60) for future in futures] == TRUTH


class HasTo:
    """What it is moved to is no device."""

    def __init__(self, unit: str) -> None:
        self.unit = unit

    def to(self, unit: str) -> "HasTo":
        if not isinstance(unit, str):
            raise TypeError(f"{unit} is no unit.")
        return HasTo(unit)


@pytest.mark.parametrize("make", [lambda: torch.ones(2).untyped_storage(), lambda: HasTo("m")])
def test_outputs_that_no_device_can_be_given_to_reach_hooks(make: Callable[[], Any], device: str) -> None:
    class Step(LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"x": batch, "made": make()}

    def kinds(accelerator: Any) -> list[type]:
        found: list[type] = []

        class Kinds(Callback):
            def on_predict_batch_end(self, _: Any, __: Any, outputs: Any, *args: Any) -> None:
                found.append(type(outputs["made"]))

        trainer(accelerator, [Kinds()]).predict(Step(), rows(4, 2), return_predictions=False)
        return found

    assert kinds(HPUInferenceAccelerator(defer_hooks=True)) == kinds("cpu")
