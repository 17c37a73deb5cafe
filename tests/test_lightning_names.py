"""The private names of Lightning that this package touches, checked on the version at hand."""

import inspect
import os
import signal
from functools import partial

import lightning
import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.progress import _ProcessedTracker, _Progress
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.profilers.pytorch import RegisterRecordFunction
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch import nn

from lightning_hpu_infer import _lightning

pytestmark = pytest.mark.smoke


def test_the_version_is_the_one_that_was_asked_for() -> None:
    assert lightning.__version__ == os.environ.get("EXPECTED_LIGHTNING", lightning.__version__)


def test_every_name_exists() -> None:
    assert all(hasattr(_lightning, name) for name in _lightning.__all__)


def test_the_prediction_loop_has_the_parts_that_ours_uses() -> None:
    parts = ["setup_data", "reset", "on_run_start", "on_run_end", "skip", "num_dataloaders"]
    assert [name for name in parts if not hasattr(_lightning.PredictionLoop, name)] == []
    loop = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).predict_loop
    assert [name for name in ("current_batch_indices", *_lightning.LOOP_NAMES) if not hasattr(loop, name)] == []
    assert isinstance(loop.batch_progress, _Progress)
    assert isinstance(loop.batch_progress.current, _ProcessedTracker)
    assert list(inspect.signature(_lightning.PredictionLoop._store_data_for_prediction_writer).parameters) == [
        "self",
        "batch_idx",
        "dataloader_idx",
    ]
    assert "done" in _DataFetcher().__dict__


def test_hooks_are_found_where_ours_looks_for_them() -> None:
    assert list(inspect.signature(LightningModule._apply_batch_transfer_handler).parameters) == [
        "self",
        "batch",
        "device",
        "dataloader_idx",
    ]
    assert "_current_fx_name" in LightningModule().__dict__
    assert list(inspect.signature(Strategy.batch_to_device).parameters) == ["self", "batch", "device", "dataloader_idx"]
    assert hasattr(
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)._data_connector, "_datahook_selector"
    )


def test_the_connector_chooses_and_pairs_strategies_where_ours_listens() -> None:
    for name in ("_choose_strategy", "_lazy_init_strategy"):
        assert list(inspect.signature(getattr(_AcceleratorConnector, name).__wrapped__).parameters) == ["self"]


def test_the_connector_checks_its_flags_where_ours_listens() -> None:
    stock = _AcceleratorConnector._check_config_and_set_final_flags.__wrapped__  # type: ignore[attr-defined]
    assert {"self", "strategy", "accelerator"} < set(inspect.signature(stock).parameters)
    assert not _lightning.is_compiled(LightningModule())


def test_the_device_of_strategy_and_precision_can_be_set() -> None:
    assert "_root_device" in SingleDeviceStrategy("cpu").__dict__
    assert "device" in MixedPrecision("bf16-mixed", "cpu").__dict__


def test_the_profilers_hooks_are_recognised_and_the_users_are_not() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    users = model[0].register_forward_hook(partial(lambda *_, name: None, name="mine"))
    with RegisterRecordFunction(model):
        before, after = model[0]._forward_pre_hooks, model[0]._forward_hooks
        assert [_lightning.is_profilers_hook(hook) for hook in before.values()] == [True]
        assert [_lightning.is_profilers_hook(hook) for hook in after.values()] == [False, True]
    users.remove()


def test_the_handlers_of_signals_are_where_ours_looks_for_them() -> None:
    quiet = {"logger": False, "enable_checkpointing": False}
    connector = Trainer(accelerator="cpu", **quiet)._signal_connector  # type: ignore[arg-type]
    before = signal.getsignal(signal.SIGTERM)
    connector.register_signal_handlers()
    try:
        assert connector._original_handlers[signal.SIGTERM] == before != signal.getsignal(signal.SIGTERM)
        assert connector.received_sigterm is False
    finally:
        connector.teardown()
    assert signal.getsignal(signal.SIGTERM) == before
