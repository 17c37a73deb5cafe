"""Places where a replaced loop easily differs from stock Lightning, each compared with it."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.helpers import Net, Rows, Writer, assert_equal, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("device")


class StopsInEndHook(Callback):
    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int, *_: Any) -> None:
        if i == 3:
            raise StopIteration


@pytest.mark.parametrize("flags", [{}, {"in_flight": 4}, {"defer_hooks": False}, {"in_flight": 9}], ids=str)
def test_an_end_hook_that_raises_stop_iteration_ends_the_run_quietly(flags: dict[str, Any]) -> None:
    expected = predict("cpu", Net(), rows(12, 2), callbacks=[StopsInEndHook()])
    actual = predict(HPUInferenceAccelerator(**flags), Net(), rows(12, 2), callbacks=[StopsInEndHook()])
    # Later batches were launched before the hook ran; what was stored by then is returned, as in stock.
    assert_equal(actual, expected)


class FunctionObject:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any, **__: Any) -> None:
        self.calls += 1


def test_hooks_of_every_kind_of_callable_are_called() -> None:
    calls = []
    for accelerator in ("cpu", HPUInferenceAccelerator()):
        function, wrapped = FunctionObject(), FunctionObject()
        lambdas = LambdaCallback(on_predict_batch_end=function)
        instance = Callback()

        @functools.wraps(instance.on_predict_batch_start)
        def around(*args: Any, wrapped: FunctionObject = wrapped, **kwargs: Any) -> None:
            wrapped(*args, **kwargs)

        vars(instance)["on_predict_batch_start"] = around
        predict(accelerator, Net(), rows(12, 2), callbacks=[lambdas, instance])
        calls.append((function.calls, wrapped.calls))
    assert calls == [(6, 6)] * 2


class DtypeRows(Rows):
    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([super().__getitem__(index)[:3], torch.ones(1) / 3])


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_the_dataset_sees_the_default_dtype_as_in_stock(precision: str) -> None:
    """Lightning sets torch's process-wide default dtype during the step; a dataset in a thread would see it too."""
    dtypes: list[torch.dtype] = []

    class Watched(DtypeRows):
        def __getitem__(self, index: int) -> Tensor:
            dtypes.append(torch.get_default_dtype())
            return super().__getitem__(index)

    predict(HPUInferenceAccelerator(), Net(), DataLoader(Watched(60), 1), precision=precision)
    assert dtypes == [torch.float32] * 60


class ReusedBuffer:
    """A loader that fills the same memory for every batch, as those of fast data libraries do."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.buffer = torch.zeros(2, 4, dtype=dtype)

    def __iter__(self) -> Any:
        for i in range(8):
            yield {"x": self.buffer.fill_(i), "i": i}

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("flags", [{}, {"async_copy": False}, {"prefetch": 5, "in_flight": 3}], ids=str)
def test_a_loader_that_reuses_its_buffer(dtype: torch.dtype, flags: dict[str, Any]) -> None:
    class Sums(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return batch["x"].float() * 2

    expected = [torch.full((2, 4), 2.0 * i) for i in range(8)]
    assert_equal(predict(HPUInferenceAccelerator(**flags, hpu_graphs=False), Sums(), ReusedBuffer(dtype)), expected)


@dataclass(frozen=True)
class Frozen:
    scores: Tensor


class FrozenOutputs(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return Frozen(self.net(batch))


def test_frozen_dataclasses_that_nobody_stores() -> None:
    seen: list[Tensor] = []

    class Sees(Callback):
        def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
            seen.append(outputs.scores.cpu())

    expected = predict("cpu", Net(), rows(12, 2))
    ours = trainer(HPUInferenceAccelerator(), callbacks=[Sees()])
    ours.predict(FrozenOutputs(), rows(12, 2), return_predictions=False)
    assert_equal(seen, expected)


class Tagged(dict):  # type: ignore[type-arg]
    """A dict with an attribute, which a rebuilt one would lack."""

    tag = "none"


def test_an_output_without_device_tensors_reaches_hooks_as_it_is() -> None:
    class TaggedOutputs(LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            out = Tagged(number=batch_idx)
            out.tag = f"batch {batch_idx}"
            return out

    tags: list[str] = []

    class Sees(Callback):
        def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
            tags.append(outputs.tag)

    predict(HPUInferenceAccelerator(hpu_graphs=False), TaggedOutputs(), rows(6, 2), callbacks=[Sees()])
    assert tags == ["batch 0", "batch 1", "batch 2"]


def test_the_progress_bar_alone_does_not_fetch_outputs(device: str) -> None:
    ours = trainer(HPUInferenceAccelerator(hpu_graphs=False), enable_progress_bar=True)
    ours.predict(Net(), rows(40, 2), return_predictions=False)
    if device == "emulator":
        # The weights come back at the end, and Lightning compares the loader's length over ranks.
        assert emulator.stats().d2h_copies <= len(list(Net().parameters())) + 2


@dataclass(frozen=True)
class Movable:
    """A batch object that knows how to move itself."""

    x: Tensor

    def to(self, device: Any, **_: Any) -> "Movable":
        return Movable(self.x.to(device))


def test_a_batch_that_moves_itself_is_left_to_itself() -> None:
    class Step(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.net(batch.x)

    loader = DataLoader(Rows(8), 2, collate_fn=lambda rows: Movable(torch.stack(rows)))
    expected = predict("cpu", Step(), loader)
    assert_equal(predict(HPUInferenceAccelerator(), Step(), loader), expected)


class BrokenAt(Rows):
    def __getitem__(self, index: int) -> Tensor:
        if index == 8:
            raise ValueError("row 8")
        return super().__getitem__(index)


@pytest.mark.parametrize("flags", [{}, {"in_flight": 3, "prefetch": 1}, {"defer_hooks": False}], ids=str)
def test_batches_before_a_fault_of_the_dataset_are_finished_first(flags: dict[str, Any]) -> None:
    writers = Writer("batch"), Writer("batch")
    for accelerator, writer in zip(("cpu", HPUInferenceAccelerator(**flags)), writers, strict=True):
        with pytest.raises(ValueError, match="row 8"):
            predict(accelerator, Net(), DataLoader(BrokenAt(20), 2), callbacks=[writer])
    assert_equal(writers[1].batches, writers[0].batches)
