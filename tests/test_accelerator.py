"""The one argument that users add, in every way that Lightning takes it."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_hpu_infer import HPUInferenceAccelerator, HPUInferenceStrategy, accelerator, devices, strategies
from tests.helpers import Net, assert_equal, installed, predict, rows, trainer

# Functions, since what is chosen depends on the device that is there when they are called.
WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "alone": lambda: {"accelerator": HPUInferenceAccelerator()},
    "devices=1": lambda: {"accelerator": HPUInferenceAccelerator(), "devices": 1},
    "devices=auto": lambda: {"accelerator": HPUInferenceAccelerator(), "devices": "auto"},
    "by name": lambda: {"accelerator": "hpu_infer"},
    "both by name": lambda: {"accelerator": "hpu_infer", "strategy": "hpu_infer"},
    "strategy by name": lambda: {"accelerator": HPUInferenceAccelerator(), "strategy": "hpu_infer"},
    "both objects": lambda: {"accelerator": HPUInferenceAccelerator(), "strategy": HPUInferenceStrategy()},
    "strategy alone": lambda: {"strategy": HPUInferenceStrategy(accelerator=HPUInferenceAccelerator())},
}


@pytest.mark.smoke
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_ask_for_it_predicts_on_the_device(way: str, device: str) -> None:
    module = Net()
    expected = predict("cpu", module, rows())
    ours = trainer(**({"accelerator": "auto"} | WAYS[way]()))
    assert_equal(ours.predict(module, rows()), expected)
    assert ours.strategy.root_device == (torch.device("hpu", 0) if device == "emulator" else torch.device("cpu"))
    assert type(ours.accelerator) is HPUInferenceAccelerator


class DeviceLog(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net().net
        self.log_of: dict[str, str] = {}

    def setup(self, stage: str) -> None:
        self.log_of["setup"] = self.device.type

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.log_of["step"] = batch.device.type
        return self.net(batch)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("strategy", ["auto", "hpu_infer"])
def test_setup_hooks_of_the_first_run_see_the_device(strategy: str) -> None:
    module = DeviceLog()
    predict(HPUInferenceAccelerator(), module, rows(), strategy=strategy)
    assert module.log_of == {"setup": "hpu", "step": "hpu"}


def test_the_explicit_strategy_needs_the_accelerator() -> None:
    with pytest.raises(MisconfigurationException, match="`strategy='hpu_infer'` needs `accelerator="):
        Trainer(accelerator="cpu", strategy="hpu_infer", logger=False)


@pytest.mark.parametrize("devices", [0, -1, [], [3], True, "many"])
def test_a_wrong_number_of_devices_is_refused(devices: Any) -> None:
    with pytest.raises(MisconfigurationException, match="devices"):
        Trainer(accelerator=HPUInferenceAccelerator(), devices=devices, logger=False)


def test_lightnings_own_ddp_on_hpus_is_refused_with_the_reason() -> None:
    refused = pytest.raises(MisconfigurationException, match=r"DDPStrategy does not set up the backend `hccl`.*'auto'")
    with installed(num_devices=2), refused:
        Trainer(accelerator=HPUInferenceAccelerator(), strategy="ddp", devices=2, logger=False)


def test_its_repr_shows_what_differs_from_the_defaults() -> None:
    assert repr(HPUInferenceAccelerator()) == "HPUInferenceAccelerator()"
    assert repr(HPUInferenceAccelerator(in_flight=2, hpu_graphs=False, max_graphs=16)) == (
        "HPUInferenceAccelerator(hpu_graphs=False, in_flight=2)"
    )
    assert repr(HPUInferenceAccelerator.auto(trace="runs")) == (
        "HPUInferenceAccelerator(pipelining='auto', trace='runs')"
    )
    assert len(repr(HPUInferenceAccelerator(group_by_length=list(range(10000))))) < 100


@pytest.mark.smoke
@pytest.mark.parametrize("options", [{}, {"strategy": "hpu_infer"}], ids=str)
def test_who_asks_for_hpu_is_told_of_ours(options: dict[str, Any]) -> None:
    if "hpu" in AcceleratorRegistry:
        pytest.skip("Lightning knows hpu beside lightning-habana")
    with pytest.raises(ValueError, match=r"invalid accelerator name: `accelerator='hpu'`.*HPUInferenceAccelerator\(\)"):
        Trainer(accelerator="hpu", logger=False, **options)
    with pytest.raises(ValueError, match=r"invalid accelerator name: `accelerator='xpu'`") as refused:
        Trainer(accelerator="xpu", logger=False, **options)
    assert "HPUInferenceAccelerator" not in str(refused.value)


# By default torch compiles with inductor, which does not know the device.
COMPILED: list[tuple[str, str, dict[str, Any]]] = [
    ("lazy", "inductor", {}),
    ("eager", "inductor", {}),
    ("eager", "hpu_backend", {}),
    ("cpu", "eager", {}),
]
COMPILED += [("eager", "hpu_backend", {"hpu_graphs": False})]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # used by inductor
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("mode", "backend", "flags"), COMPILED, ids=str)
def test_a_compiled_module_is_predicted_with(
    mode: str, backend: str, flags: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    module = Net()
    expected = predict("cpu", Net(), rows())
    with nullcontext() if mode == "cpu" else installed(lazy=mode == "lazy"):
        compiled: Any = torch.compile(module, backend=backend)
        ours = trainer(HPUInferenceAccelerator(**flags))
        for each in (compiled, compiled, module):
            assert_equal(ours.predict(each, rows()), expected)
    traced = "`torch.compile` is taken off" in caplog.text
    assert traced == (mode != "cpu" and not flags)
    assert (ours.predict_loop.graph_counts is not None) == traced  # type: ignore[attr-defined]


def test_a_strategy_on_another_device_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="runs on hpu or cpu, the strategy has meta"):
        predict(HPUInferenceAccelerator(), Net(), rows(), strategy=SingleDeviceStrategy("meta"))


@pytest.mark.usefixtures("emulated")
def test_a_strategy_for_the_cpu_beside_an_hpu_is_noted() -> None:
    with pytest.warns(UserWarning, match="There is an HPU, but SingleDeviceStrategy was made for the CPU"):
        predict(HPUInferenceAccelerator(), Net(), rows(), strategy=SingleDeviceStrategy("cpu"))


def test_without_an_hpu_one_warning_names_both_remedies() -> None:
    devices.warn_of_cpu.cache_clear()
    with pytest.warns(UserWarning, match="No HPU was found.*habana_frameworks.*LIGHTNING_HPU_INFER_EMULATOR=1") as seen:
        predict(HPUInferenceAccelerator(), Net(), rows())
        predict(HPUInferenceAccelerator(), Net(), rows())
    assert len([warning for warning in seen if "No HPU" in str(warning.message)]) == 1


def test_names_are_registered_and_registering_again_does_nothing() -> None:
    accelerator.register()
    strategies.register()
    assert "hpu_infer" in AcceleratorRegistry
    assert "hpu_infer" in StrategyRegistry


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_mixed_precision_is_on_for_the_device_in_use(precision: str, dtype: torch.dtype, device: str) -> None:
    predictions = predict(HPUInferenceAccelerator(), Net(), rows(), precision=precision)
    assert {scores.dtype for scores in predictions} == {dtype}


@pytest.mark.usefixtures("emulated")
def test_device_stats_are_the_bridges() -> None:
    stats = HPUInferenceAccelerator().get_device_stats("hpu")
    assert stats["InUse"] == 0
    assert HPUInferenceAccelerator().get_device_stats("cpu") == {}


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")  # made by Lightning, before we are asked
def test_mixed_precision_of_16_bits(device: str) -> None:
    ours = trainer(HPUInferenceAccelerator(), precision="16-mixed")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        predictions: Any = ours.predict(Net(), rows())
    warned = [str(warning.message) for warning in seen if "16-mixed" in str(warning.message)]
    # As stock Lightning does on the CPU, which has no fp16 autocast.
    assert {scores.dtype for scores in predictions} == {torch.float16 if device == "emulator" else torch.bfloat16}
    assert len(warned) == (device == "cpu")


def test_other_stages_still_work(device: str) -> None:
    class Tested(Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("mean", self.net(batch).mean())

    module = Tested()
    expected = trainer("cpu").test(module, rows(), verbose=False)
    actual = trainer(HPUInferenceAccelerator()).test(module, rows(), verbose=False)
    assert actual[0]["mean"] == pytest.approx(expected[0]["mean"], rel=1e-5)


def python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_registers_and_does_nothing_else() -> None:
    code = (
        "import os, sys, threading; before = dict(os.environ)\n"
        "import lightning_hpu_infer\n"
        "print(threading.active_count(), dict(os.environ) == before, 'habana_frameworks' in sys.modules)"
    )
    assert python(code) == "1 True False"


def test_pyarrow_is_needed_for_predictions_on_disk_alone() -> None:
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import lightning_hpu_infer as ours\n"
        "from lightning_hpu_infer.cli import main\n"
        "asks = lambda: ours.PredictionWriter('x'), lambda: ours.read_predictions, lambda: ours.iter_predictions\n"
        "for ask in asks:\n"
        "    try: ask()\n"
        "    except ImportError as error: print(error)\n"
        "print(main(['predictions', 'x']))"
    )
    message = "Predictions on disk need pyarrow: pip install 'lightning-hpu-infer[write]'"
    assert python(code).splitlines() == [message] * 3 + ["2"]


def test_the_environment_variable_installs_the_emulator() -> None:
    code = (
        "import lightning_hpu_infer; from lightning_hpu_infer import emulator\n"
        "import torch; print(emulator.is_installed(), torch.zeros(2).to('hpu').device)"
    )
    assert python(code, LIGHTNING_HPU_INFER_EMULATOR="1") == "True hpu:0"
    code = "import lightning_hpu_infer; from lightning_hpu_infer import emulator"
    assert python(code + "; print(emulator.is_installed())", LIGHTNING_HPU_INFER_EMULATOR="0") == "False"


@pytest.mark.full
@pytest.mark.parametrize(("value", "counted"), [("8", "8 True"), ("yes", "1 True")])
def test_the_environment_variable_says_how_many_devices_are_emulated(value: str, counted: str) -> None:
    code = "import lightning_hpu_infer, torch; print(torch.hpu.device_count(), torch.hpu.is_available())"
    assert python(code, LIGHTNING_HPU_INFER_EMULATOR=value) == counted
