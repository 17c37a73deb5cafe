"""The devices of this machine: how many there are, what predicts, and what does not train."""

import logging
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_hpu_infer import HPUInferenceAccelerator, _habana, devices
from tests.helpers import Net, installed, predict, rows, trainer


class Trained(Net):
    """Counts its steps of training."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-4)


def ask_for(number: Any, **options: Any) -> int:
    """The processes per machine of a Trainer that was asked for so many devices."""
    return Trainer(accelerator=HPUInferenceAccelerator(), devices=number, logger=False, **options).num_devices


def test_more_devices_than_there_are_are_refused_with_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    told = r"`devices=99` needs 99 HPUs on this machine, and the bridge finds 1 \(HABANA_VISIBLE_MODULES unset\)"
    with installed(), pytest.raises(MisconfigurationException, match=told) as refused:
        ask_for(99)
    assert "EmulatorConfig(num_devices=99)" in str(refused.value)
    with installed(num_devices=8):
        assert ask_for(8) == 8
        assert ask_for(8, num_nodes=4) == 8  # per machine
        with pytest.raises(MisconfigurationException, match=r"needs 9 HPUs .* finds 8"):
            ask_for(9)
        monkeypatch.setenv("HABANA_VISIBLE_MODULES", "4,5,6")
        assert ask_for("3") == 3
        with pytest.raises(
            MisconfigurationException, match=r"needs 4 HPUs .* finds 3 \(HABANA_VISIBLE_MODULES=4,5,6\)"
        ):
            ask_for(4)


def test_without_an_hpu_there_may_be_any_number_of_processes() -> None:
    assert ask_for(99) == 99


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "SLURM_PROCID"])
def test_processes_that_others_have_started_are_counted_per_machine(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun with `devices` of two machines; and SLURM, where a task may see nothing but its own device."""
    monkeypatch.setenv(variable, "2")
    with installed(num_devices=2):
        assert HPUInferenceAccelerator.parse_devices(4) == 4


def test_torchrun_with_more_processes_than_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with installed(num_devices=2), pytest.raises(MisconfigurationException, match=r"needs 4 HPUs .* finds 2"):
        HPUInferenceAccelerator.parse_devices(4)


@pytest.mark.parametrize("lazy", [True, False])
def test_fit_on_the_emulated_hpu_is_refused_in_words(lazy: bool) -> None:
    module = Trained()
    with installed(lazy=lazy):
        ours = trainer(HPUInferenceAccelerator(), max_epochs=1)
        with pytest.raises(MisconfigurationException, match="The emulated HPU cannot train: it has no autograd"):
            ours.fit(module, rows(4, 2))
        assert module.steps == 0
        assert len(ours.predict(module, rows(4, 2)) or []) == 2


@pytest.mark.parametrize(("lazy", "warnings"), [(True, 1), (False, 0)])
def test_fit_on_a_real_hpu_is_left_to_the_user(
    lazy: bool, warnings: int, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(_habana, "is_emulated", lambda: False)
    monkeypatch.setattr(_habana, "is_lazy", lambda: lazy)
    devices.check_training()
    assert [
        str(each.message) for each in recwarn if "nothing marks the steps" in str(each.message)
    ] != [] or not warnings
    assert len(recwarn) == warnings


def test_without_an_hpu_fit_trains_on_the_cpu() -> None:
    module = Trained()
    trainer(HPUInferenceAccelerator(), max_epochs=1).fit(module, rows(4, 2))
    assert module.steps == 2


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "redicting on" in each.getMessage()]


@pytest.mark.parametrize(
    ("lazy", "where"),
    [
        (True, "an emulated HPU (lazy mode), whose speed is not a Gaudi's"),
        (False, "an emulated HPU (eager mode), whose speed is not a Gaudi's"),
        (None, "the CPU"),
    ],
)
def test_the_log_says_once_what_predicts(lazy: bool | None, where: str, caplog: pytest.LogCaptureFixture) -> None:
    devices._log.cache_clear()
    caplog.set_level(logging.INFO)
    if lazy is None:
        for _ in range(2):
            predict(HPUInferenceAccelerator(), Net(), rows(4, 2))
    else:
        with installed(lazy=lazy):
            for _ in range(2):
                predict(HPUInferenceAccelerator(), Net(), rows(4, 2))
    assert said(caplog) == [f"HPUInferenceAccelerator: predicting on {where}."]


def test_a_real_hpu_is_not_called_emulated(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    devices._log.cache_clear()
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(_habana, "is_emulated", lambda: False)
    with installed():
        devices.log_device(torch.device("hpu", 0))
    assert said(caplog) == ["HPUInferenceAccelerator: predicting on an HPU (lazy mode)."]
