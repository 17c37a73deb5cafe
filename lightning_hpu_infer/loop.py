"""The prediction loop: batches are prepared ahead, launched, retired behind, and finished with their end hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hpu_infer import _habana
from lightning_hpu_infer._lightning import FETCH_SPAN, PredictionLoop, no_grad_context
from lightning_hpu_infer.ahead import reason_against
from lightning_hpu_infer.batch import Batch, counters_of, shown_to_hooks
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.graphs import GraphCounts, StepGraphs, graph_kind
from lightning_hpu_infer.hooks import BatchHooks, reads_outputs, uses_dataloader_iter
from lightning_hpu_infer.in_flight import InFlight, raise_after
from lightning_hpu_infer.lengths.buckets import Buckets, NoBuckets
from lightning_hpu_infer.observe.report import Counters
from lightning_hpu_infer.observe.run import Totals, TracedRun
from lightning_hpu_infer.observer import Lane, Observer, Observers, Stage
from lightning_hpu_infer.ownership import may_reuse_memory
from lightning_hpu_infer.postprocess import Postprocess
from lightning_hpu_infer.prefetch import Prefetcher
from lightning_hpu_infer.samples import GRAPH_PER_LENGTH, Samples
from lightning_hpu_infer.source import host_batches, is_of_device, warmed_up
from lightning_hpu_infer.step import sets_default_dtype, step_on_device
from lightning_hpu_infer.transfer import AsyncOutputs, PendingOutput, fetch, host_copy, pin, to_host
from lightning_hpu_infer.tuning import Depths, DepthTuner
from lightning_hpu_infer.writing.callback import begin_writing

T = TypeVar("T")


class PipelinedPredictionLoop(PredictionLoop):
    """Lightning's prediction loop with several batches under way at once. Main thread only."""

    trainer: Any  # Lightning sets most of the attributes read here without declaring them.
    batch_progress: Any
    _combined_loader: Any

    config: InferenceConfig
    _graphs: StepGraphs | None
    _buckets: Buckets

    # Of a run
    _hooks: BatchHooks
    _observer: Observer = Observer()
    _tuner: DepthTuner | None
    _async_outputs: AsyncOutputs | None
    _in_flight: InFlight[Batch]
    _postprocess: Postprocess[Batch]
    _samples: Samples
    _overlaps: bool  # whether a later step may run before a batch's output is taken

    @classmethod
    def install_on(cls, loop: PredictionLoop, config: InferenceConfig) -> None:
        """Turn a trainer's prediction loop into this class, in place.

        A new object would lose what the trainer has attached to the loop when the accelerator is set up: data source,
        `return_predictions`, totals of earlier runs (Lightning 2.6 `trainer.py`). A loop of the user's own class stays
        as it is.
        """
        if type(loop) not in (PredictionLoop, cls):
            rank_zero_warn(
                f"`trainer.predict_loop` is a {type(loop).__qualname__}, which runs as it is: on the accelerator's"
                " device, but without graphs, asynchronous copies, pipelining and the other options of"
                " `HPUInferenceAccelerator`. To have them, leave the Trainer's loop in place."
            )
            return
        loop.__class__ = cls
        if (state := loop.__dict__).get("config") is not config:
            buckets = Buckets(config) if config.bucket_lengths else NoBuckets()
            state.update(config=config, _graphs=None, _buckets=buckets, _tuner=None)

    # Run

    def run(self) -> Any:
        """Predict every batch. Without `pipelining` everything happens in stock Lightning's order."""
        if uses_dataloader_iter(self.trainer.lightning_module):
            # Such a step fetches its batches itself, so there is nothing to prepare ahead.
            if self.config.trace is not None:
                rank_zero_warn("`trace` has no effect: `predict_step` fetches its batches itself (`dataloader_iter`).")
            with step_on_device(self.trainer.strategy, self._graphs_of_run, Observer()):
                return super().run()
        with self._recorded() as trace, step_on_device(self.trainer.strategy, self._graphs_of_run, trace):
            return self._run(trace)

    @no_grad_context
    def _run(self, trace: Observer) -> Any:
        before, self._observer, self._tuner = self._observer, trace, None
        self.setup_data()
        if self.skip:
            return None
        self.reset()
        self.on_run_start()
        if self._graphs is not None:
            self._graphs.expect(sum(self._samples.max_batches))
        depth = self._prefetch_depth()
        self._hooks = BatchHooks(self.trainer, threaded=depth > 0, observer=trace)
        self._async_outputs = AsyncOutputs() if self.config.async_output else None
        self._in_flight = InFlight(self._launch, self.config.in_flight_depth(self.trainer.strategy.root_device.type))
        mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad  # both are per thread
        self._postprocess = Postprocess(self.config, mode, trace, threads=not sets_default_dtype(self.trainer.strategy))
        try:
            # Stock Lightning ends a run quietly too when a step or a hook raises it.
            ahead = Prefetcher(self._host_batches(depth), depth, mode, is_of_device)
            with suppress(StopIteration), self._postprocess, ahead as prepared:
                (self._predict_pipelined if self._is_pipelined(depth) else self._predict_in_order)(prepared)
        finally:
            self._restarting, self._observer = False, before
            self._in_flight.clear()
            # An error's traceback holds this object; what was in flight must not live as long.
            del self._hooks, self._async_outputs, self._in_flight, self._postprocess
        return self.on_run_end()

    def _predict_in_order(self, prepared: Prefetcher[Batch]) -> None:
        """The order of stock Lightning: a batch is finished before the next one is fetched."""
        for batch in prepared:
            # Without a name for the output, so that it is gone from the device before the next step.
            self._finish(batch, self._postprocessed(batch, self._buckets.cut(self._step(batch), batch.lengths)))

    def _predict_pipelined(self, prepared: Prefetcher[Batch]) -> None:
        """The order of the stages: batches are prepared ahead, launched, and retired behind."""
        in_flight = self._in_flight
        self._observer = self._tuned(prepared, in_flight)
        take = self._observer.wrap(Stage.WAIT_INPUT, partial(next, self._warmed_up(prepared), None))
        dataloader_idx = 0
        while (batch := self._completing(take)) is not None:
            if batch.dataloader_idx != dataloader_idx:
                # Progress bars start anew with a loader's first start hook.
                self._drain()
                dataloader_idx = batch.dataloader_idx
            self._completing(in_flight.launch, batch)
            while in_flight.over_capacity:
                self._retire()
        self._drain()

    def _completing(self, stage: Callable[..., T], *args: Any) -> T:
        """Run a stage; if it fails, complete the batches that were launched before first, as in stock Lightning."""
        try:
            return stage(*args)
        except BaseException as error:
            raise_after(self._drain, error)

    def _drain(self) -> None:
        while self._in_flight:
            self._retire()
        self._complete_all()

    def _complete_all(self) -> None:
        while self._postprocess:
            self._complete()

    # Launch

    def _launch(self, batch: Batch) -> PendingOutput:
        """Enqueue one batch without waiting for the device."""
        output = self._step(batch)
        fetch = batch.wanted
        batch.late_hooks = self._hooks.late_end_hooks(self.config.defer_hooks if self._overlaps else True)
        if batch.late_hooks is not None:
            fetch |= reads_outputs(batch.late_hooks) or self._postprocess.is_on
        else:
            # In stock Lightning all batches before are stored when a batch's end hooks run.
            self._drain()
            self._observer.at(batch.index)
            output = self._postprocessed(batch, self._buckets.cut(output, batch.lengths))
            self._end(batch, output)
            fetch &= not self._postprocess.is_on
        return PendingOutput(
            output,
            self.trainer.strategy.root_device,
            # On the CPU an output is complete, and if it is taken before the next step, as it is in stock Lightning.
            fetch=fetch and self._overlaps,
            asynchronous=self._async_outputs,
            observer=self._observer,
            batch=batch.index,
        )

    def _step(self, batch: Batch) -> Any:
        """Stock Lightning's step up to its end hooks."""
        hooks, progress, dataloader_idx = self._hooks, self.batch_progress, batch.dataloader_idx
        self._observer.at(batch.index)
        progress.is_last_batch = batch.is_last
        data = hooks.to_device(batch.data, dataloader_idx)
        batch.data = None
        progress.increment_ready()
        any_on_epoch = hooks.reads_indices and self._samples.noted(self._store_data_for_prediction_writer, batch)
        batch.wanted = self._return_predictions or any_on_epoch
        batch.sample_indices = self.current_batch_indices
        batch.hook_args = (data, *self._indices(batch))
        hooks.start(*batch.hook_args)
        progress.increment_started()
        output = hooks.step(*batch.hook_args)
        if output is None:
            self._warning_cache.warn("predict returned None if it was on purpose, ignore this warning...")
        progress.increment_processed()
        batch.counters = counters_of(progress)
        return output

    def _indices(self, batch: Batch) -> tuple[int, ...]:
        """What hooks and the step are told of a batch beside its data."""
        batch_idx = batch.batch_idx + self._samples.first[batch.dataloader_idx]
        return (batch_idx, batch.dataloader_idx) if self.num_dataloaders > 1 else (batch_idx,)

    # Retire

    def _retire(self) -> None:
        """Wait for the oldest batch's output and finish the batch, or the one that its post-processing waits for."""
        try:
            batch, output = self._in_flight.retire()
            self._observer.completed(output)
            if batch.late_hooks is not None:
                output = self._buckets.cut(output, batch.lengths)
        except BaseException as error:
            raise_after(self._complete_all, error)
        if batch.late_hooks is None:
            self._store(batch, output)
        else:
            self._postprocess.submit(batch, output, batch.index)
        while self._postprocess.over_capacity:
            self._complete()

    def _complete(self) -> None:
        """Wait until the oldest batch's output is post-processed and finish the batch."""
        batch, output = self._postprocess.take()
        with shown_to_hooks(self, batch):
            self._finish(batch, output)

    # Finish

    def _postprocessed(self, batch: Batch, output: Any) -> Any:
        """The output right after the step; post-processed, it is on the host, where the function may write to it."""
        if self._postprocess.is_on:
            output = fetch(output, self.trainer.strategy.root_device, self._observer, batch.index, host_copy)
        return self._postprocess.call(batch, output)

    def _finish(self, batch: Batch, output: Any) -> None:
        self._end(batch, output)
        self._store(batch, output)

    def _end(self, batch: Batch, output: Any) -> None:
        self._hooks.end(batch.late_hooks, output, *batch.hook_args)
        self.batch_progress.increment_completed()
        batch.hook_args, batch.late_hooks = (), None

    def _store(self, batch: Batch, output: Any) -> None:
        if batch.wanted:
            output = output if self._postprocess.is_on else self._fetched(batch, output)
            self._predictions[batch.dataloader_idx].append(output)

    def _fetched(self, batch: Batch, output: Any) -> Any:
        if self._observer.records and not self.config.pipelining:  # else it was fetched when it was retired
            return fetch(output, self.trainer.strategy.root_device, self._observer, batch.index)
        return to_host(output)

    # What a run is made of

    def setup_data(self) -> None:
        """Make the dataloaders, and choose which of their samples are predicted in which order."""
        super().setup_data()
        if self.skip:
            return
        by, loaders = self.config.group_by_length, self._combined_loader.flattened
        self._samples = Samples(loaders, self.max_batches, by, begin_writing(self.trainer, loaders, self._observer))
        if by is not None and self._graphs is not None and not self._buckets.pads:
            rank_zero_info(GRAPH_PER_LENGTH)
        self._buckets.start(self._samples.longest)

    def reset(self) -> None:
        """Begin a run."""
        self.max_batches = self._samples.max_batches
        super().reset()
        self.max_batches = self._samples.totals  # which progress bars show
        # Stock Lightning's loop only appends to each of them.
        self._predictions = self._samples.collectors or self._predictions

    def on_run_end(self) -> Any:
        """End a run: all that a hook or the user sees of it is in the dataset's order again."""
        if self._samples.collectors:
            self._predictions = self._samples.predictions()
            if any(self.epoch_batch_indices):
                self.epoch_batch_indices = self._samples.batch_indices()
        del self._samples  # it may hold every prediction
        if self._graphs is not None and self._graphs.counts.captures:
            rank_zero_info(str(self._graphs.counts))
        if self._tuner is not None:
            rank_zero_info("\n".join(self._tuner.summary()))
        return super().on_run_end()

    def _is_pipelined(self, depth: int) -> bool:
        """Whether anything goes on beside the main thread's work on a batch; else stock order is as fast."""
        config, behind = self.config, self._in_flight.depth + self._postprocess.depth
        tunes = config.tunes_depths(self.trainer.strategy.root_device.type)
        self._overlaps = bool(config.pipelining) and (self._on_hpu or tunes or behind > 0)
        return self._overlaps or (bool(config.pipelining) and (depth > 0 or config.warm_up))

    @property
    def _on_hpu(self) -> bool:
        return bool(self.trainer.strategy.root_device.type == _habana.DEVICE_TYPE)

    @property
    def _pins(self) -> bool:
        """Whether inputs go through pinned memory."""
        return self.config.async_copy and self._on_hpu

    def _prefetch_depth(self) -> int:
        """Batches to prepare ahead; a dataset in a thread would make tensors of the step's default dtype by chance."""
        depth = self.config.prefetch_depth(self.trainer.strategy.root_device.type)
        if not depth or sets_default_dtype(self.trainer.strategy):
            return 0
        listeners = [self.trainer.lightning_module, *self.trainer.callbacks, self.trainer.datamodule]
        if self.config.prefetch is None and (reason := reason_against(self._combined_loader.flattened, listeners)):
            rank_zero_info(f"No batch is prepared ahead, since {reason}. Pass `prefetch={depth}` if it may be.")
            return 0
        return depth

    def _host_batches(self, depth: int) -> Iterator[Batch]:
        ahead = depth + self._in_flight.depth + self._postprocess.depth > 0 or self.config.pipelining == "auto"
        return host_batches(
            self._samples.without_skipped(self._data_fetcher),  # `iter()` of it would start the dataloaders again
            reused=[ahead and may_reuse_memory(loader) for loader in self._combined_loader.flattened],
            convert=self._hooks.before_transfer,
            buckets=self._buckets,
            pins=self._pins,
            observer=self._observer,
            lane=Lane.PREFETCH if depth else Lane.MAIN,
            progress=None if self.config.pipelining else self.batch_progress,
        )

    def _warmed_up(self, prepared: Iterator[Batch]) -> Iterator[Batch]:
        if not self.config.warm_up:
            return prepared
        quiet = self.trainer.progress_bar_callback is None or not self.trainer.is_global_zero

        def run(data: Any, batch: Batch) -> None:
            data = self._hooks.to_device(pin(data) if self._pins else data, batch.dataloader_idx)
            self._hooks.step(data, *self._indices(batch))

        return warmed_up(prepared, self._buckets, run, times=2 + self.config.verify_graphs, quiet=quiet)

    def _tuned(self, prepared: Prefetcher[Batch], in_flight: InFlight[Batch]) -> Observer:
        """The run's observer, with one that sets the depths if those are not fixed."""
        if not self.config.tunes_depths(self.trainer.strategy.root_device.type):
            return self._observer

        def apply(depths: Depths) -> None:
            prepared.set_depth(depths.prefetch)
            in_flight.depth = depths.in_flight

        self._tuner = DepthTuner(Depths(prepared.depth, in_flight.depth), self.config.depth_memory, apply=apply)
        return Observers(self._observer, self._tuner)

    @contextmanager
    def _recorded(self) -> Iterator[Observer]:
        """Record the run if asked to, and write what limited it."""
        if self.config.trace is None:
            yield Observer()
            return
        with TracedRun.of_trainer(self.config, self.trainer, self._totals) as traced:
            yield traced.trace

    def _totals(self) -> Totals:
        counts, tuner = self.graph_counts or GraphCounts(), self._tuner
        counters = Counters(**counts.totals(), padded_elements=self._buckets.padded, real_elements=self._buckets.real)
        return (counters, tuner.depths, tuner.summary()) if tuner is not None else (counters, None, ())

    # The step on the device

    def _graphs_of_run(self) -> StepGraphs | None:
        """The graphs of the run before if they are of use, else none yet."""
        module, device = self.trainer.lightning_module, self.trainer.strategy.root_device
        kind = graph_kind(device, self.config)
        if kind is None:
            self.release_graphs()
        elif self._graphs is None or not self._graphs.can_reuse(module, device, self.config, kind):
            self.release_graphs()  # before there are new ones
            self._graphs = StepGraphs(module, device, self.config, kind)
        return self._graphs

    def release_graphs(self) -> None:
        """Free the device memory that graphs hold between runs."""
        if self._graphs is not None:
            self._graphs.release()
        self._graphs = None

    @property
    def graph_counts(self) -> GraphCounts | None:
        """What graphs did in the newest run; None where there are none."""
        return None if self._graphs is None else self._graphs.counts

    # Lightning's data fetcher calls these.

    def _on_before_fetch(self) -> None:
        self.trainer.profiler.start(FETCH_SPAN)

    def _on_after_fetch(self) -> None:
        self.trainer.profiler.stop(FETCH_SPAN)
