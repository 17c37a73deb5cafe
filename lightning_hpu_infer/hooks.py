"""The hooks of one run, looked up once instead of once per batch.

What is called, in which order, with which profiler span and which `_current_fx_name`, is as in Lightning's
`trainer/call.py`. Stock Lightning resolves all of it anew for every batch, which costs it about half of its host time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_hpu_infer._lightning import datahook_owner, has_stock_transfer, with_fx_name
from lightning_hpu_infer.observer import Observer, Stage

Hook = Callable[..., Any]
_STAGES = {"on_predict_batch_start": Stage.START_HOOKS, "on_predict_batch_end": Stage.END_HOOKS}


class BatchHooks:
    """What a prediction loop calls for every batch.

    Without a profiler, hooks that nobody overrides are left out, since only their span could be noticed.

    Args:
        trainer: A `Trainer` whose run has started: callbacks and datamodule are final.
        threaded: Whether a thread calls `before_transfer`, while others call the rest.
        observer: Observes the stages of the main thread.
    """

    start: Hook
    """`on_predict_batch_start` of all callbacks and the module: `(batch, batch_idx[, dataloader_idx])`."""
    end: Hook
    """`on_predict_batch_end`, likewise, with the outputs first."""
    before_transfer: Hook | None
    """The precision plugin's `convert_input` and `on_before_batch_transfer`: `(batch, dataloader_idx) -> batch`.

    None if neither does anything.
    """
    to_device: Hook
    """The strategy's `batch_to_device`: `(batch, dataloader_idx) -> batch`."""
    step: Hook
    """The strategy's `predict_step`: `(batch, batch_idx[, dataloader_idx]) -> output`."""
    end_reads_outputs: bool
    """Whether any end hook could read an output. Lightning's own progress bars do not."""

    reads_indices: bool
    """Whether a prediction writer reads the indices of a batch's samples."""

    def __init__(self, trainer: Any, *, threaded: bool, observer: Observer) -> None:
        self._trainer = trainer
        self._observer = observer
        self._module: LightningModule = trainer.lightning_module
        self._profiler = None if isinstance(trainer.profiler, PassThroughProfiler) else trainer.profiler
        self.start = self._batch_hook("on_predict_batch_start")
        self.end = self._batch_hook("on_predict_batch_end")
        self.end_reads_outputs = any(
            not _is_stock("on_predict_batch_end", listener) and not _is_lightnings_bar(listener)
            for listener in self._listeners()
        )
        self.reads_indices = any(isinstance(callback, BasePredictionWriter) for callback in trainer.callbacks)
        self.before_transfer = self._before_transfer(named=not threaded)
        self.to_device = self._to_device()
        self.step = observer.wrap(Stage.LAUNCH, self._step())

    def _listeners(self) -> list[Any]:
        return [*self._trainer.callbacks, self._module]

    def _batch_hook(self, name: str) -> Hook:
        calls = []
        for listener in self._listeners():
            if self._profiler is None and _is_stock(name, listener):
                continue
            hook, span = getattr(listener, name), f"[LightningModule]{type(listener).__name__}.{name}"
            if listener is not self._module:
                hook, span = partial(hook, self._trainer, self._module), f"[Callback]{listener.state_key}.{name}"
            calls.append(self._spanned(span, hook))

        def call_all(*args: Any) -> None:
            for call in calls:
                call(*args)

        if not calls:
            return call_all
        return self._observer.wrap(_STAGES[name], self._named(name, call_all))

    def _step(self) -> Hook:
        step = self._strategy_hook("predict_step", self._trainer.strategy.predict_step)
        if is_param_in_hook_signature(self._module.predict_step, "batch_idx", min_args=2):
            return step
        return lambda batch, batch_idx, *dataloader_idx: step(batch, *dataloader_idx)

    def _before_transfer(self, *, named: bool) -> Hook | None:
        precision = self._trainer.precision_plugin
        hook, convert = self._data_hook("on_before_batch_transfer", named=named), precision.convert_input
        if type(precision).convert_input is not Precision.convert_input:
            return lambda batch, dataloader_idx: hook(convert(batch), dataloader_idx)
        return None if hook is _unchanged else hook

    def _to_device(self) -> Hook:
        strategy = self._trainer.strategy
        copies = True
        if type(strategy).batch_to_device is Strategy.batch_to_device and has_stock_transfer(self._module):
            device = strategy.root_device
            transfer = self._data_hook("transfer_batch_to_device")
            after = self._data_hook("on_after_batch_transfer")
            copies = device.type != "cpu" or transfer is not _transfer or after is not _unchanged

            def batch_to_device(batch: Any, dataloader_idx: int) -> Any:
                return after(transfer(batch, device, dataloader_idx), dataloader_idx)
        else:

            def batch_to_device(batch: Any, dataloader_idx: int) -> Any:
                return strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)

        hook = self._strategy_hook("batch_to_device", batch_to_device)
        return self._observer.wrap(Stage.COPY_IN, hook) if copies else hook

    def _strategy_hook(self, name: str, hook: Hook) -> Hook:
        return self._named(name, self._spanned(f"[Strategy]{type(self._trainer.strategy).__name__}.{name}", hook))

    def _data_hook(self, name: str, *, named: bool = True) -> Hook:
        """A hook that belongs to the module unless the datamodule overrides it."""
        owner = datahook_owner(self._trainer, name)
        if self._profiler is None and _is_stock(name, owner):
            return _transfer if name == "transfer_batch_to_device" else _unchanged
        kind = "LightningModule" if owner is self._module else "LightningDataModule"
        hook = self._spanned(f"[{kind}]{type(owner).__name__}.{name}", getattr(owner, name))
        return self._named(name, hook) if named and owner is self._module else hook

    def _spanned(self, name: str, hook: Hook) -> Hook:
        profiler = self._profiler
        if profiler is None:
            return hook

        def call(*args: Any) -> Any:
            with profiler.profile(name):
                return hook(*args)

        return call

    def _named(self, name: str, hook: Hook) -> Hook:
        return with_fx_name(self._module, name, hook)


def _is_stock(name: str, owner: object) -> bool:
    """Whether a hook is Lightning's default, whose effect is known. Any other hook is called."""
    function = getattr(getattr(owner, name), "__func__", None)
    return any(function is getattr(base, name, owner) for base in (Callback, LightningModule, LightningDataModule))


def _is_lightnings_bar(listener: object) -> bool:
    return isinstance(listener, ProgressBar) and type(listener).__module__.startswith("lightning.")


def _unchanged(batch: Any, dataloader_idx: int) -> Any:
    return batch


def _transfer(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
    # The most common batch of all, without a search for what it may hold.
    return batch.cpu() if type(batch) is Tensor and device.type == "cpu" else move_data_to_device(batch, device)


def step_of(strategy: Strategy) -> tuple[Hook, Callable[[], AbstractContextManager[Any]] | None]:
    """What `strategy.predict_step` calls, and the precision plugin's context around it, where they can be told apart.

    The context is None where the plugin has none, or where a strategy's own `predict_step` enters it.
    """
    module, precision = strategy.lightning_module, strategy.precision_plugin
    if (
        module is None
        or strategy.model is not module
        or getattr(strategy.predict_step, "__func__", None) is not Strategy.predict_step
    ):
        return strategy.predict_step, None
    plain = (
        type(precision).predict_step_context is Precision.predict_step_context
        and type(precision).forward_context is Precision.forward_context
    )

    def step(*args: Any, **kwargs: Any) -> Any:
        # Looked up at each call: a hook may replace it.
        return module.predict_step(*args, **kwargs)

    return step, None if plain else precision.predict_step_context


def uses_dataloader_iter(module: LightningModule) -> bool:
    """Whether `predict_step` takes `dataloader_iter` and so fetches its batches itself."""
    return bool(is_param_in_hook_signature(module.predict_step, "dataloader_iter", explicit=True))
