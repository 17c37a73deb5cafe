"""A pipeline runs a LightningModule as a Trainer does, and other modules as they are."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_hpu_infer import InferenceConfig, InferencePipeline
from tests.helpers import Net, Rows, assert_equal, predict, rows


class Hooked(Net):
    """Each hook does something that shows in the predictions."""

    def configure_model(self) -> None:
        if not hasattr(self, "bias"):
            self.bias = nn.Parameter(torch.ones(3))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 2

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device(batch + 1, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch - 3

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"scores": self.net(batch) + self.bias, "index": batch_idx, "training": self.training}


class WithoutIndex(Net):
    def predict_step(self, batch: Any) -> Any:  # type: ignore[override]
        return self.net(batch)


@pytest.mark.parametrize("kind", [Net, Hooked, WithoutIndex])
@pytest.mark.parametrize("makes", [False, True], ids=["module", "factory"])
def test_a_lightning_module_predicts_what_it_predicts_in_a_trainer(
    kind: type[LightningModule], makes: bool, device: str
) -> None:
    truth = predict("cpu", kind(), rows(10, 2))
    with InferencePipeline(kind if makes else kind()) as pipeline:
        assert_equal(list(pipeline.predict(rows(10, 2))), truth)
        futures = [pipeline.submit(batch) for batch in rows(10, 2)]
        assert_equal([future.result(60) for future in futures], truth)


def test_mixed_precision_is_a_trainers(device: str) -> None:
    truth = predict("cpu", Net(), rows(10, 2), precision="bf16-mixed")
    assert truth[0].dtype == torch.bfloat16
    with InferencePipeline(Net(), precision="bf16-mixed") as pipeline:
        assert_equal(list(pipeline.predict(rows(10, 2))), truth)
    with InferencePipeline(Net().net, precision="bf16-mixed") as pipeline:
        assert_equal(list(pipeline.predict(rows(10, 2))), truth)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "16-mixed"])
def test_a_precision_that_it_has_not_is_refused(precision: Any) -> None:
    with pytest.raises(ValueError, match=r"`precision"):
        InferencePipeline(Net(), "cpu", precision=precision)


def test_what_needs_a_trainer_is_refused() -> None:
    class Fetches(Net):
        def predict_step(self, dataloader_iter: Any) -> Any: ...  # type: ignore[override]

    class Handles(Net):
        def _apply_batch_transfer_handler(self, *args: Any, **kwargs: Any) -> Any: ...

    with pytest.raises(TypeError, match="fetches its batches itself"):
        InferencePipeline(Fetches(), "cpu")
    with pytest.raises(TypeError, match="Handles overrides `_apply_batch_transfer_handler`"):
        InferencePipeline(Handles(), "cpu")


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "a part"])
def test_what_torch_has_exported_is_taken_as_it_is(inside: bool, device: str) -> None:
    exported = torch.export.export(Net().net, (Rows(2).rows,)).module()
    model: Any = exported
    if inside:
        model = nn.Sequential(exported, nn.Dropout(0.9))
    truth = [predict("cpu", Net(), rows(6, 2))[index] for index in range(3)]
    with InferencePipeline(model) as pipeline:
        assert_equal(list(pipeline.predict(rows(6, 2))), truth)


def test_a_device_that_is_not_here_is_refused_in_words() -> None:
    with pytest.raises(MisconfigurationException, match=r"`device='hpu:0'`, and there is no HPU here.*device='cpu'"):
        InferencePipeline(Net(), "hpu:0")


def test_a_function_for_a_model_runs_outside_of_inference_mode() -> None:
    made = []

    def make() -> nn.Module:
        made.append(Net().net)
        return made[0]

    with InferencePipeline(make, "cpu", InferenceConfig(hpu_graphs=False)) as pipeline:
        list(pipeline.predict([Rows(1).rows]))
    assert not any(parameter.is_inference() for parameter in made[0].parameters())
    x = torch.ones(1, 4)
    made[0](x).sum().backward()  # it can be trained afterwards
    assert isinstance(made[0][0].weight.grad, Tensor)
