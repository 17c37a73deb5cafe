"""The Lightning side of pipelined prediction: hooks and bookkeeping around the engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loops.prediction_loop import _PredictionLoop
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.loops.utilities import _no_grad_context
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_hpu_infer import _habana
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.fetch import PendingOutput
from lightning_hpu_infer.pipeline import DeviceStep, InFlight
from lightning_hpu_infer.prefetch import Prefetcher
from lightning_hpu_infer.transfer import stage

_HOST = torch.device("cpu")


@dataclass
class _Moment:
    """What the loop shows to hooks, at the moment when a batch's step was done."""

    is_last_batch: bool
    batch_indices: list[int]
    current: _ProcessedTracker
    total: _ProcessedTracker


@dataclass
class _Batch:
    """One batch on its way. It carries all that its end hooks read, since the loop is at later batches by then."""

    batch: Any
    batch_idx: int
    dataloader_idx: int
    is_last: bool
    store: bool = False
    hook_kwargs: dict[str, Any] = field(default_factory=dict)
    moment: _Moment | None = None


class PipelinedPredictionLoop(_PredictionLoop):
    """Lightning's prediction loop with several batches under way at once."""

    config: InferenceConfig
    trainer: Any  # Lightning sets most of the attributes read here without declaring them.
    batch_progress: Any

    @classmethod
    def take_over(cls, loop: _PredictionLoop, config: InferenceConfig) -> None:
        """Turn a trainer's own loop into this class, in place.

        A new object would lose what the trainer has attached to the loop when the accelerator is set up: data source,
        `return_predictions`, totals of earlier runs (Lightning `trainer.py`).
        """
        loop.__class__ = cls
        loop.__dict__["config"] = config

    def run(self) -> Any:
        """Predict every batch. Without `pipelining` this is stock Lightning's loop."""
        step = self.trainer.lightning_module.predict_step
        # A step that pulls its own batches cannot be fed ahead.
        pulls = is_param_in_hook_signature(step, "dataloader_iter", explicit=True)
        with self._device_step():
            return self._run_pipelined() if self.config.pipelining and not pulls else super().run()

    @_no_grad_context
    def _run_pipelined(self) -> Any:
        self.setup_data()
        if self.skip:
            return None
        self.reset()
        self.on_run_start()
        in_flight = InFlight(self._launch, self.config.in_flight)
        try:
            self._launch_all(in_flight)
            self._drain(in_flight)
        finally:
            self._restarting = False
            # An error's traceback holds this frame; what was in flight must not live as long.
            in_flight.clear()
        return self.on_run_end()

    def _launch_all(self, in_flight: InFlight[_Batch]) -> None:
        """The order of the stages: batches are prepared ahead, launched, and retired behind."""
        loader = 0
        # Grad and inference mode are per thread.
        mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
        with Prefetcher(self._prepared_batches(), self.config.prefetch, mode) as prepared:
            for item in prepared:
                if item.dataloader_idx != loader:
                    # Progress bars start anew with a loader's first start hook.
                    self._drain(in_flight)
                    loader = item.dataloader_idx
                try:
                    in_flight.launch(item)
                except StopIteration:
                    return  # Stock Lightning ends the run quietly too when a step raises it.
                if in_flight.overdue:
                    self._retire(*in_flight.retire())

    def _drain(self, in_flight: InFlight[_Batch]) -> None:
        while in_flight:
            self._retire(*in_flight.retire())

    def _prepared_batches(self) -> Iterator[_Batch]:
        """Host batches, ready to be copied. Advancing this iterator is the prefetching thread's work."""
        trainer, fetcher = self.trainer, self._data_fetcher
        assert fetcher is not None
        owner = trainer._data_connector._datahook_selector.get_instance("on_before_batch_transfer")
        kind = "LightningModule" if owner is trainer.lightning_module else "LightningDataModule"
        span = f"[{kind}]{type(owner).__name__}.on_before_batch_transfer"
        stages = self.config.async_copy and trainer.strategy.root_device.type == _habana.DEVICE_TYPE

        def prepare(fetched: tuple[Any, int, int]) -> _Batch:
            batch, batch_idx, dataloader_idx = fetched
            is_last = fetcher.done
            batch = trainer.precision_plugin.convert_input(batch)
            # Not through Lightning's own call: it writes `_current_fx_name` of the module, which is the main thread's.
            with trainer.profiler.profile(span):
                batch = owner.on_before_batch_transfer(batch, dataloader_idx)
            return _Batch(stage(batch) if stages else batch, batch_idx, dataloader_idx, is_last)

        # `iter(fetcher)` would start the dataloaders again.
        return map(prepare, iter(partial(next, fetcher), None))

    def _launch(self, item: _Batch) -> PendingOutput:
        """Enqueue one batch: stock Lightning's step up to where it would wait for the device."""
        trainer, progress, device = self.trainer, self.batch_progress, self.trainer.strategy.root_device
        progress.is_last_batch = item.is_last
        batch = call._call_strategy_hook(trainer, "batch_to_device", item.batch, dataloader_idx=item.dataloader_idx)
        item.batch = None
        progress.increment_ready()
        any_on_epoch = self._store_data_for_prediction_writer(item.batch_idx, item.dataloader_idx)
        item.store = self._return_predictions or any_on_epoch

        dataloader_idx = item.dataloader_idx if self.num_dataloaders > 1 else None
        item.hook_kwargs = self._build_kwargs(batch, item.batch_idx, dataloader_idx)
        self._call_batch_hooks("on_predict_batch_start", *item.hook_kwargs.values())
        progress.increment_started()

        step_args = self._build_step_args_from_hook_kwargs(item.hook_kwargs, "predict_step")
        output = call._call_strategy_hook(trainer, "predict_step", *step_args)
        if output is None:
            self._warning_cache.warn("predict returned None if it was on purpose, ignore this warning...")
        progress.increment_processed()

        if not self.config.defer_hooks:
            self._end(item, output)
            return PendingOutput(output, device, fetch=item.store)
        item.moment = self._moment()
        return PendingOutput(output, device, fetch=item.store or self._end_hooks_listen())

    def _retire(self, item: _Batch, output: Any) -> None:
        """Finish the oldest batch, whose output has arrived."""
        if item.moment is not None:
            with self._at(item.moment):
                self._end(item, output)
        if item.store:
            self._predictions[item.dataloader_idx].append(move_data_to_device(output, _HOST))

    def _end(self, item: _Batch, output: Any) -> None:
        self._call_batch_hooks("on_predict_batch_end", output, *item.hook_kwargs.values())
        self.batch_progress.increment_completed()
        item.hook_kwargs = {}

    def _call_batch_hooks(self, name: str, *args: Any) -> None:
        call._call_callback_hooks(self.trainer, name, *args)
        call._call_lightning_module_hook(self.trainer, name, *args)

    def _end_hooks_listen(self) -> bool:
        """Whether any end hook could read an output: if none does, outputs that nobody stores stay on the device."""
        listeners = (*self.trainer.callbacks, self.trainer.lightning_module)
        return any(is_overridden("on_predict_batch_end", listener) for listener in listeners)

    def _moment(self) -> _Moment:
        progress = self.batch_progress
        return _Moment(progress.is_last_batch, self.current_batch_indices, copy(progress.current), copy(progress.total))

    @contextmanager
    def _at(self, moment: _Moment) -> Iterator[None]:
        """Show the loop as it was at an earlier moment, since later batches were launched.

        `BasePredictionWriter` reads the indices, and other callbacks the counters, from the loop when they are
        called. Batches that are completed meanwhile stay so. After an error the earlier moment stays in view.
        """
        newest = self._moment()
        self._show(moment)
        yield
        self._show(newest)

    def _show(self, moment: _Moment) -> None:
        progress = self.batch_progress
        progress.is_last_batch = moment.is_last_batch
        self.current_batch_indices = moment.batch_indices
        for tracker, then in ((progress.current, moment.current), (progress.total, moment.total)):
            tracker.ready, tracker.started, tracker.processed = then.ready, then.started, then.processed

    def _on_before_fetch(self) -> None:
        self.trainer.profiler.start(_FETCH_SPAN)

    def _on_after_fetch(self) -> None:
        self.trainer.profiler.stop(_FETCH_SPAN)

    @contextmanager
    def _device_step(self) -> Iterator[None]:
        """Run the networks of `predict_step` as graphs and launch what it enqueued, whichever strategy calls it."""
        strategy = self.trainer.strategy
        if "predict_step" in vars(strategy):
            # A run inside a run, as of `BatchSizeFinder`.
            yield
            return
        step = DeviceStep(strategy.predict_step, self.trainer.lightning_module, strategy.root_device, self.config)
        strategy.predict_step = step
        try:
            yield
        finally:
            del strategy.predict_step
            step.close()


# Stock Lightning's name, which its own tools and users' filters look for.
_FETCH_SPAN = f"[{_PredictionLoop.__name__}].predict_next"
