"""Every private name of Lightning that this package touches, with what it is used for.

Checked on Lightning 2.4.0, 2.5.5 and 2.6.6; `tests/test_lightning_names.py` fails where one of them moves. The loop
subclasses `_PredictionLoop`, and so uses `LOOP_NAMES` as its own attributes.
"""

import signal
import threading
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any

from lightning.fabric.accelerators.registry import _AcceleratorRegistry as AcceleratorRegistry
from lightning.fabric.utilities.distributed import _init_dist_connection as init_dist_connection
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.prediction_loop import _PredictionLoop as PredictionLoop
from lightning.pytorch.loops.utilities import _no_grad_context as no_grad_context
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.profilers.pytorch import RegisterRecordFunction
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

__all__ = [
    "FETCH_SPAN",
    "LOOP_NAMES",
    "AcceleratorRegistry",
    "PredictionLoop",
    "check_flags",
    "choose_strategy",
    "datahook_owner",
    "forget_indices",
    "has_stock_transfer",
    "init_dist_connection",
    "is_compiled",
    "is_profilers_hook",
    "no_grad_context",
    "note_sigterm_alone",
    "pair_strategy",
    "set_batch_sampler",
    "starts_processes",
    "users_batch_sampler",
    "wants_several_processes",
    "with_fx_name",
]

LOOP_NAMES = (
    "_combined_loader",
    "_data_fetcher",
    "_on_after_fetch",
    "_on_before_fetch",
    "_predictions",
    "_restarting",
    "_return_predictions",
    "_store_data_for_prediction_writer",
    "_warning_cache",
)
"""Private attributes of the prediction loop."""

FETCH_SPAN = f"[{PredictionLoop.__name__}].predict_next"
"""The profiler's name for a fetch, which Lightning's tools and users' filters look for."""


_FORGOTTEN: list[int] = []
"""One list for all batches, of which there may be millions."""


def datahook_owner(trainer: Trainer, name: str) -> Any:
    """Whose data hook is called: the module's, unless the datamodule overrides it."""
    selector: Any = trainer._data_connector._datahook_selector
    return selector.get_instance(name)


def has_stock_transfer(module: LightningModule) -> bool:
    """Whether a batch goes to the device through the three transfer hooks and nothing else."""
    return type(module)._apply_batch_transfer_handler is LightningModule._apply_batch_transfer_handler


def with_fx_name(module: LightningModule, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook during which the module's `_current_fx_name` is set, past the costly `nn.Module.__setattr__`."""
    state = module.__dict__

    def call(*args: Any) -> Any:
        previous, state["_current_fx_name"] = state["_current_fx_name"], name
        output = hook(*args)
        state["_current_fx_name"] = previous
        return output

    return call


def users_batch_sampler(sampler: object) -> Any:
    """The batch sampler inside of the one that Lightning puts into a dataloader for prediction; None without one."""
    return sampler._batch_sampler if isinstance(sampler, _IndexBatchSamplerWrapper) else None


def forget_indices(loader: object, batch_idx: int) -> None:
    """Let a dataloader forget which samples a batch has, of which it notes every one."""
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, _IndexBatchSamplerWrapper):
        sampler.seen_batch_indices[batch_idx] = _FORGOTTEN


def set_batch_sampler(sampler: _IndexBatchSamplerWrapper, batches: Any) -> None:
    """Replace the batch sampler inside of the one that Lightning puts into a dataloader for prediction."""
    sampler._batch_sampler = batches


def is_compiled(module: LightningModule) -> bool:
    """Whether its steps are those of `torch.compile(module)`, which was given to the Trainer in its place."""
    return module._compiler_ctx is not None


def is_profilers_hook(hook: object) -> bool:
    """Whether a module's hook is `PyTorchProfiler`'s, which labels what the module runs and changes nothing."""
    return isinstance(getattr(getattr(hook, "func", None), "__self__", None), RegisterRecordFunction)


def starts_processes(strategy: object) -> bool:
    """Whether a strategy runs the Trainer's functions in processes that it starts, not in this one."""
    return isinstance(getattr(strategy, "launcher", None), _MultiProcessingLauncher)


def note_sigterm_alone(trainer: Any) -> None:
    """Have a rank of several note SIGTERM without the others, until its run ends.

    Lightning's handler, which notes it for `trainer.received_sigterm`, broadcasts to all ranks first (2.5.5; not yet in
    2.4.0), for training. It does so in the middle of what the main thread does, a capture for one, and waits or fails
    if another rank is at its end, or gone. Lightning puts back what was there before when the run ends.
    """
    if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
        return
    connector = trainer._signal_connector
    users = connector._original_handlers.get(signal.SIGTERM)

    def note(signum: int, frame: FrameType | None) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not connector.received_sigterm:
            launcher.kill(signum)  # the ranks that this one has started
        connector.received_sigterm = True
        if callable(users):
            users(signum, frame)

    signal.signal(signal.SIGTERM, note)


def wants_several_processes(connector: Any) -> bool:
    """Whether a Trainer was asked for several devices or nodes."""
    return len(connector._parallel_devices) > 1 or connector._num_nodes_flag > 1


def choose_strategy(choose: Callable[[Any, Callable[[Any], Any]], Any]) -> None:
    """Replace how a Trainer chooses the strategy that `strategy="auto"` means. Does nothing the second time.

    Args:
        choose: Called with the connector and Lightning's function.
    """
    _replace("_choose_strategy", choose)


def pair_strategy(pair: Callable[[Any, Callable[[Any], Any]], Any]) -> None:
    """Replace how a Trainer pairs its strategy with its accelerator. Does nothing the second time.

    Args:
        pair: Called with the connector and Lightning's function.
    """
    _replace("_lazy_init_strategy", pair)


def check_flags(check: Callable[..., Any]) -> None:
    """Replace how a Trainer checks what it was asked for. Does nothing the second time.

    Args:
        check: Called with the connector, Lightning's function, and the flags as keyword arguments.
    """
    _replace("_check_config_and_set_final_flags", check)


def _replace(name: str, replacement: Callable[..., Any]) -> None:
    stock = getattr(_AcceleratorConnector, name)
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def call(connector: Any, **flags: Any) -> Any:
        return replacement(connector, stock, **flags)

    setattr(_AcceleratorConnector, name, call)
