"""The hooks of one run, with as little as possible looked up per batch.

What is called, in which order, with which profiler span and which `_current_fx_name`, is as in Lightning's
`trainer/call.py`. Stock Lightning resolves all of it anew for every batch, which costs it about half of its host time.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_hpu_infer._lightning import datahook_owner, has_stock_transfer, with_fx_name
from lightning_hpu_infer.late import may_write_late
from lightning_hpu_infer.observer import Observer, Stage

Hook = Callable[..., Any]
_START, _END = "on_predict_batch_start", "on_predict_batch_end"
_STAGES = {_START: Stage.START_HOOKS, _END: Stage.END_HOOKS}
_PACKAGES = ("lightning.", "lightning_hpu_infer.")


class BatchHook(NamedTuple):
    """One hook of a batch, and whose it is."""

    listener: Any
    """A callback, or the LightningModule."""
    hook: Hook

    @property
    def may_be_late(self) -> bool:
        """Whether an end hook may run after later steps: that of a writer, of Lightning's classes or of ours.

        Any other may change weights, the module's state or the batch, or read them. A writer that has a start hook may
        keep there what it writes.
        """
        if _is_stock(self.hook):
            return True  # it does nothing; with a profiler it has a span
        kind, function = type(self.listener), getattr(self.hook, "__func__", None)
        if isinstance(self.listener, BasePredictionWriter) and not kind.__module__.startswith(_PACKAGES):
            return function is BasePredictionWriter.on_predict_batch_end and _is_ours(getattr(self.listener, _START))
        return kind.__module__.startswith(_PACKAGES) and _is_ours(self.hook)


class BatchHooks:
    """What a prediction loop calls for every batch.

    Without a profiler, hooks that nobody overrides are left out, since only their span could be noticed. Callbacks that
    are added and hooks that are replaced during the run are called as in stock Lightning.

    Args:
        trainer: A `Trainer` whose run has started: callbacks and datamodule are final.
        threaded: Whether a thread calls `before_transfer`, while others call the rest.
        observer: Observes the stages of the main thread.
    """

    start: Hook
    """`on_predict_batch_start` of all callbacks and the module: `(batch, batch_idx[, dataloader_idx])`."""
    end: Hook
    """`on_predict_batch_end`, likewise, with the end hooks to call and the outputs first; None for all there are."""
    before_transfer: Hook | None
    """The precision plugin's `convert_input` and `on_before_batch_transfer`: `(batch, dataloader_idx) -> batch`.

    None if neither does anything.
    """
    to_device: Hook
    """The strategy's `batch_to_device`: `(batch, dataloader_idx) -> batch`."""
    step: Hook
    """The strategy's `predict_step`: `(batch, batch_idx[, dataloader_idx]) -> output`."""
    reads_indices: bool
    """Whether a prediction writer reads the indices of a batch's samples."""

    def __init__(self, trainer: Any, *, threaded: bool, observer: Observer) -> None:
        self._trainer = trainer
        self._observer = observer
        self._told = False
        self._late: dict[int, bool] = {}
        self._module: LightningModule = trainer.lightning_module
        self._profiler = None if isinstance(trainer.profiler, PassThroughProfiler) else trainer.profiler
        self.start = self._batch_hook(_START, self._call_start)
        self.end = self._batch_hook(_END, self._call_end)
        self.reads_indices = any(isinstance(callback, BasePredictionWriter) for callback in trainer.callbacks)
        self.before_transfer = self._before_transfer(named=not threaded)
        self.to_device = self._to_device()
        self.step = observer.wrap(Stage.LAUNCH, self._step())

    def late_end_hooks(self, defer: bool | Literal["auto"]) -> list[BatchHook] | None:
        """The end hooks that stock Lightning would call now, if they may run later; None if they may not.

        Args:
            defer: The option `defer_hooks`.
        """
        hooks = list(self._hooks_now(_END)) if defer else []
        unsafe = [hook for hook in hooks if not self._may_be_late(hook)] if defer == "auto" else []
        if unsafe and not self._told:
            self._told = True
            whose = ", ".join(dict.fromkeys(type(hook.listener).__name__ for hook in unsafe))
            rank_zero_info(
                f"`{_END}` of {whose} may change, or read, what later steps change, so end hooks run right after each"
                " step, as in stock Lightning. If they use their arguments only, pass `defer_hooks=True`: they then run"
                " when outputs have arrived, while the device is busy with later batches."
            )
        return None if unsafe or not defer else hooks

    def _may_be_late(self, hook: BatchHook) -> bool:
        return hook.may_be_late and (not isinstance(hook.listener, BasePredictionWriter) or self._may_write_late(hook))

    def _may_write_late(self, hook: BatchHook) -> bool:
        if (found := self._late.get(id(hook.listener))) is None:
            steps = [self._module, *(each for each in self._trainer.callbacks if not _is_ours(getattr(each, _START)))]
            loaders = self._trainer.predict_loop._combined_loader.flattened
            found = self._late[id(hook.listener)] = may_write_late(hook.listener, steps, loaders)
        return found

    def _hooks_now(self, name: str) -> Iterable[BatchHook]:
        """The hooks of that name, of the callbacks first; those that a callback adds meanwhile are among them."""
        for callback in self._trainer.callbacks:
            hook = getattr(callback, name)
            if self._profiler is not None or not _is_stock(hook):
                yield BatchHook(callback, hook)
        hook = getattr(self._module, name)
        if self._profiler is not None or not _is_stock(hook):
            yield BatchHook(self._module, hook)

    def _call_start(self, *args: Any) -> None:
        self._call(_START, self._hooks_now(_START), args)

    def _call_end(self, hooks: list[BatchHook] | None, *args: Any) -> None:
        self._call(_END, self._hooks_now(_END) if hooks is None else hooks, args)

    def _call(self, name: str, hooks: Iterable[BatchHook], args: tuple[Any, ...]) -> None:
        for listener, hook in hooks:
            is_module = listener is self._module
            given = args if is_module else (self._trainer, self._module, *args)
            if self._profiler is None:
                hook(*given)
                continue
            whose = f"[LightningModule]{type(listener).__name__}" if is_module else f"[Callback]{listener.state_key}"
            self._spanned(f"{whose}.{name}", hook)(*given)

    def _batch_hook(self, name: str, call: Hook) -> Hook:
        called = self._named(name, call)
        # A stage in which nothing can happen is not observed.
        return self._observer.wrap(_STAGES[name], called) if any(self._hooks_now(name)) else called

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
        if self._profiler is None and _is_stock(getattr(owner, name)):
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


_STOCK = frozenset(
    function
    for base in (Callback, LightningModule, LightningDataModule)
    for name in (_START, _END, "on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    if (function := getattr(base, name, None)) is not None
)


def _is_stock(hook: Hook) -> bool:
    """Whether a hook is Lightning's default, whose effect is known. Any other hook is called."""
    return getattr(hook, "__func__", None) in _STOCK


def _is_ours(hook: Hook) -> bool:
    """Whether a hook is one of Lightning's or ours, and not of a class of the user's."""
    return getattr(getattr(hook, "__func__", None), "__module__", "").startswith(_PACKAGES)


def reads_outputs(hooks: Iterable[BatchHook]) -> bool:
    """Whether any of them could read an output. Lightning's own progress bars do not."""
    return not all(
        isinstance(listener, ProgressBar) and type(listener).__module__.startswith("lightning.")
        for listener, _ in hooks
    )


def _unchanged(batch: Any, dataloader_idx: int) -> Any:
    return batch


def _transfer(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
    # The most common batch of all, without a search for what it may hold.
    return batch.cpu() if type(batch) is Tensor and device.type == "cpu" else move_data_to_device(batch, device)


def uses_dataloader_iter(module: LightningModule) -> bool:
    """Whether `predict_step` takes `dataloader_iter` and so fetches its batches itself."""
    return bool(is_param_in_hook_signature(module.predict_step, "dataloader_iter", explicit=True))
