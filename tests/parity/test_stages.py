"""Prediction among the other things that people do with a Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.helpers import Net, Rows, assert_equal, predict, rows, trainer


class Trained(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.net(batch).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-4)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_predict_after_fit() -> None:
    runs = []
    for accelerator in ("cpu", HPUInferenceAccelerator()):
        torch.manual_seed(0)
        module, ours = Trained(), trainer(accelerator, max_epochs=2)
        ours.fit(module, rows(8, 2))
        predictions = ours.predict(module, rows(8, 2))
        ours.fit_loop.max_epochs = 3
        ours.fit(module, rows(8, 2))
        runs.append((predictions, list(module.state_dict().values())))
    assert_equal(runs[1], runs[0])


def test_validate_and_predict_in_turn(device: str) -> None:
    module = Trained()
    ours = trainer(HPUInferenceAccelerator())
    expected = trainer("cpu").validate(module, rows(8, 2), verbose=False)
    predictions = predict("cpu", module, rows(8, 2))
    for _ in range(2):
        losses = ours.validate(module, rows(8, 2), verbose=False)
        assert losses[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
        assert_equal(ours.predict(module, rows(8, 2)), predictions)


class Noisy(Rows):
    def __getitem__(self, index: int) -> Tensor:
        return super().__getitem__(index) + torch.rand(4)


class NoisyStep(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch) + torch.rand(1).item()


def test_random_numbers_without_pipelining_are_stocks(device: str) -> None:
    runs = []
    for accelerator in ("cpu", HPUInferenceAccelerator(pipelining=False, hpu_graphs=False)):
        torch.manual_seed(7)
        runs.append(predict(accelerator, NoisyStep(), DataLoader(Noisy(12), 2)))
    assert_equal(runs[1], runs[0])


class Saves(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, i: int, *_: Any) -> None:
        if i == 1:
            trainer.save_checkpoint(self.path)


def test_checkpoints_hold_host_tensors(device: str, tmp_path: Path) -> None:
    module = Net()
    predict(HPUInferenceAccelerator(), module, rows(8, 2), callbacks=[Saves(tmp_path / "a.ckpt")])
    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"]
    assert {tensor.device.type for tensor in saved.values()} == {"cpu"}
    assert_equal(list(saved.values()), list(module.state_dict().values()))
