"""lightning-habana 1.6.0 beside our accelerator, on the emulator: it works, or it is refused with the reason.

`make matrix` lays it over the Lightning versions that it can be imported on.
"""

import enum
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.loops.prediction_loop import _PredictionLoop
from lightning.pytorch.profilers import pytorch as lightning_profilers
from lightning.pytorch.strategies import StrategyRegistry
from lightning_utilities.core.imports import package_available
from packaging.version import Version

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.loop import PipelinedPredictionLoop
from tests.helpers import ALL_OFF, Net, assert_equal, predict, rows, trainer
from tests.parity.processes import check, launch, results

LIGHTNING = Version(lightning.__version__)
SYNAPSE = "1.20.0"

if Version("2.5.6") <= LIGHTNING:
    pytest.skip(
        "lightning-habana 1.6.0 cannot be imported on Lightning 2.5.6 and later, which dropped the names it needs",
        allow_module_level=True,
    )

pytestmark = pytest.mark.smoke


@pytest.fixture
def habana(emulated: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """lightning-habana, imported anew: it looks once, at import, for the device and for the driver's version."""
    (folder := tmp_path / "bin").mkdir()
    tool = folder / "hl-smi"
    tool.write_text(f"#!/bin/sh\necho 'Habanalabs hl-smi/hlml version hl-{SYNAPSE}-fw-58.0.0.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    _forget_habana()
    yield importlib.import_module("lightning_habana")
    # With the next Trainer, Lightning imports it again, then without a device.
    emulator.uninstall()
    _forget_habana()


def _forget_habana() -> None:
    package_available.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_habana"]:
        del sys.modules[name]
    # Lightning registers them whenever a Trainer is made and the names are free.
    registries: list[Any] = [AcceleratorRegistry, StrategyRegistry]
    for registry in registries:
        for name in ("hpu", "hpu_single", "hpu_parallel"):
            if name in registry:
                registry.remove(name)


def assert_like_stock(ours: Trainer, **stock: Any) -> None:
    """Ours predicted on the HPU, through graphs, what stock Lightning predicts on the CPU."""
    emulator.reset_stats()
    assert_equal(ours.predict(Net(), rows()), predict("cpu", Net(), rows(), **stock))
    assert ours.strategy.root_device.type == "hpu"
    assert type(ours.predict_loop) is PipelinedPredictionLoop
    assert emulator.stats().replays > 0


def test_it_sees_the_emulated_device(habana: Any) -> None:
    assert habana.HPU_AVAILABLE
    assert habana.HPUAccelerator.is_available()
    assert habana.HPUAccelerator.get_device_name()


# Its strategy for one device


@pytest.mark.parametrize("by_name", [False, True])
def test_single_hpu_strategy(habana: Any, by_name: bool) -> None:
    ours = trainer(HPUInferenceAccelerator(), strategy="hpu_single" if by_name else habana.SingleHPUStrategy())
    assert_like_stock(ours)
    assert type(ours.strategy) is habana.SingleHPUStrategy


def test_single_hpu_strategy_with_our_accelerator_inside(habana: Any) -> None:
    ours = trainer("auto", strategy=habana.SingleHPUStrategy(accelerator=HPUInferenceAccelerator(prefetch=3)))
    assert_like_stock(ours)
    assert isinstance(ours.accelerator, HPUInferenceAccelerator)


def test_single_hpu_strategy_predicts_again(habana: Any) -> None:
    ours = trainer(HPUInferenceAccelerator(), strategy=habana.SingleHPUStrategy())
    assert_like_stock(ours)
    assert_like_stock(ours)


def test_single_hpu_strategy_with_every_technique_off(habana: Any) -> None:
    ours = trainer(HPUInferenceAccelerator(**ALL_OFF), strategy=habana.SingleHPUStrategy())
    assert_equal(ours.predict(Net(), rows()), predict("cpu", Net(), rows()))
    assert emulator.stats().replays == 0


# Its precision plugin


@pytest.mark.parametrize("single", [False, True], ids=["our strategy", "its strategy"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_precision_plugin(habana: Any, precision: str, single: bool) -> None:
    strategy = habana.SingleHPUStrategy() if single else "auto"
    plugin = habana.HPUPrecisionPlugin(precision)
    ours = trainer(HPUInferenceAccelerator(), strategy=strategy, plugins=[plugin])
    assert_like_stock(ours, precision=precision)
    assert ours.precision_plugin is plugin


def test_its_strategy_with_lightnings_own_mixed_precision(habana: Any) -> None:
    ours = trainer(HPUInferenceAccelerator(), strategy=habana.SingleHPUStrategy(), precision="bf16-mixed")
    assert_like_stock(ours, precision="bf16-mixed")


def test_half_precision_runs_on_the_device_in_half(habana: Any) -> None:
    plugin = habana.HPUPrecisionPlugin("16-mixed")
    half: Any = predict(HPUInferenceAccelerator(), Net(), rows(), plugins=[plugin])
    full: Any = predict("cpu", Net(), rows())
    assert {batch.dtype for batch in half} == {torch.float16}
    torch.testing.assert_close([batch.float() for batch in half], full, rtol=1e-2, atol=1e-2)


# Its checkpoints


class Saver(Callback):
    """Saves a checkpoint while batches are under way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_predict_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if args[3] == 2:
            trainer.save_checkpoint(self.path)


def other_weights() -> LightningModule:
    module = Net()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.125)
    return module


@pytest.mark.parametrize("single", [False, True], ids=["our strategy", "its strategy"])
@pytest.mark.parametrize("when", ["during", "after"])
def test_checkpoint_io_saves_and_loads(habana: Any, when: str, single: bool, tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        return {"strategy": habana.SingleHPUStrategy()} if single else {"plugins": [habana.HPUCheckpointIO()]}

    file = tmp_path / "saved.ckpt"
    callbacks = [Saver(file)] if when == "during" else []
    saving = trainer(HPUInferenceAccelerator(), callbacks, **options())
    assert isinstance(saving.strategy.checkpoint_io, habana.HPUCheckpointIO)
    saving.predict(Net(), rows())
    if when == "after":
        saving.save_checkpoint(file)

    state = torch.load(file, weights_only=False)["state_dict"]
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    loaded: Any = trainer(HPUInferenceAccelerator(), **options()).predict(other_weights(), rows(), ckpt_path=file)
    assert_equal(loaded, predict("cpu", Net(), rows()))


def test_checkpoints_of_ours_load_with_its_strategy(habana: Any, tmp_path: Path) -> None:
    ours = trainer(HPUInferenceAccelerator(), [Saver(file := tmp_path / "saved.ckpt")])
    ours.predict(Net(), rows())
    its = trainer(HPUInferenceAccelerator(), strategy=habana.SingleHPUStrategy())
    assert_equal(its.predict(other_weights(), rows(), ckpt_path=file), predict("cpu", Net(), rows()))


# Its profiler


class Activity(enum.Enum):
    """What Habana's bridge puts in the place of torch's own (bridge `activity_profiler.py`)."""

    CPU = 0
    CUDA = 1
    HPU = 2


class Profile(torch.profiler.profile):
    """The same for the profiler: it takes those activities. Nothing is recorded of the device."""

    def __init__(
        self,
        *,
        activities: list[Activity],
        schedule: Callable[[int], torch.profiler.ProfilerAction] | None = None,
        on_trace_ready: Callable[..., Any] | None = None,
    ) -> None:
        assert Activity.HPU in activities
        host = [torch._C._profiler.ProfilerActivity.CPU]
        super().__init__(activities=host, schedule=schedule, on_trace_ready=on_trace_ready)


@pytest.fixture
def patched_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.profiler, "ProfilerActivity", Activity)
    # On a Gaudi this comes of importing lightning-habana, and with it the bridge, before Lightning.
    monkeypatch.setattr(lightning_profilers, "ProfilerActivity", Activity)


@pytest.mark.parametrize("single", [False, True], ids=["our strategy", "its strategy"])
def test_profiler(patched_profiler: None, habana: Any, single: bool, tmp_path: Path) -> None:
    profiler = habana.HPUProfiler(dirpath=tmp_path, filename="profile")
    strategy = habana.SingleHPUStrategy() if single else "auto"
    assert_like_stock(ours := trainer(HPUInferenceAccelerator(), strategy=strategy, profiler=profiler))
    traces = [json.loads(file.read_text()) for file in tmp_path.glob("*.pt.trace.json")]
    spans = {event.get("name") for trace in traces for event in trace["traceEvents"]}
    name = type(ours.strategy).__name__
    assert f"[pl][profile][Strategy]{name}.predict_step" in spans


def test_profiler_is_refused_by_itself_after_lightning_was_imported(habana: Any) -> None:
    with pytest.raises(AssertionError, match="lightning_habana should be imported before lightning"):
        habana.HPUProfiler()


# Its accelerator


@pytest.mark.parametrize("by_name", [False, True])
def test_its_accelerator_keeps_its_own_strategy_and_lightnings_loop(habana: Any, by_name: bool) -> None:
    its = trainer("hpu" if by_name else habana.HPUAccelerator(), devices=1)
    assert_equal(its.predict(Net(), rows()), predict("cpu", Net(), rows()))
    assert type(its.strategy) is habana.SingleHPUStrategy
    assert type(its.predict_loop) is _PredictionLoop


def test_its_accelerator_with_our_strategy_is_refused(habana: Any) -> None:
    expected = "`strategy='hpu_infer'` needs `accelerator=HPUInferenceAccelerator(...)`"
    with pytest.raises(MisconfigurationException, match=re.escape(expected) + ".*got HPUAccelerator"):
        trainer(habana.HPUAccelerator(), strategy="hpu_infer", devices=1)


def test_an_accelerator_in_both_places_is_refused(habana: Any) -> None:
    strategy = habana.SingleHPUStrategy(accelerator=habana.HPUAccelerator())
    with pytest.raises(MisconfigurationException, match="accelerator set through both"):
        trainer(HPUInferenceAccelerator(), strategy=strategy)


# Its strategies for several devices


@pytest.mark.parametrize("strategy", ["HPUDDPStrategy", pytest.param("HPUParallelStrategy", marks=pytest.mark.full)])
def test_two_devices_predict_every_sample_once(strategy: str, tmp_path: Path) -> None:
    code, output = launch(tmp_path, "emulator", strategy, "2")
    assert code == 0, output
    ranks = results(tmp_path)
    check(ranks)
    assert [rank["strategy"] for rank in ranks] == [strategy] * 2
    assert [rank["root_device"] for rank in ranks] == ["hpu"] * 2
    assert [rank["checkpoint_io"] for rank in ranks] == ["HPUCheckpointIO"] * 2
    assert all(rank["replays"] > 0 for rank in ranks)


@pytest.mark.parametrize("strategy", ["HPUDDPStrategy", pytest.param("HPUParallelStrategy", marks=pytest.mark.full)])
def test_strategy_for_several_devices_on_one(strategy: str, tmp_path: Path) -> None:
    code, output = launch(tmp_path, "emulator", strategy, "1")
    assert code == 0, output
    (only,) = results(tmp_path)
    assert (only["strategy"], only["root_device"]) == (strategy, "hpu")
    expected: Any = predict("cpu", Net(), rows(23))
    assert_equal([torch.tensor(batch) for batch in only["predictions"]], expected)
    assert [index for indices in only["indices"] for index in indices] == list(range(23))
