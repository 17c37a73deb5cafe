"""The Lightning side of pipelined prediction: hooks and bookkeeping around the engine."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch.loops.prediction_loop import _PredictionLoop
from lightning.pytorch.loops.utilities import _no_grad_context
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, default_convert
from tqdm.auto import tqdm

from lightning_hpu_infer import _habana
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.fetch import PendingOutput, PinnedBuffers, fetched
from lightning_hpu_infer.graphs import GraphCounts, StepGraphs, graph_kind
from lightning_hpu_infer.hooks import BatchHooks, Hook, pulls_batches, step_of
from lightning_hpu_infer.lengths.buckets import Buckets, Lengths
from lightning_hpu_infer.lengths.order import Reordered
from lightning_hpu_infer.observe.report import Counters
from lightning_hpu_infer.observe.run import TracedRun
from lightning_hpu_infer.observe.spans import Stage, Trace
from lightning_hpu_infer.pipeline import DeviceStep, InFlight
from lightning_hpu_infer.prefetch import Prefetcher
from lightning_hpu_infer.transfer import own, size_of, stage, tensors_of, to_host
from lightning_hpu_infer.tuning import Depths, DepthTuner


@dataclass(slots=True)
class _Batch:
    """One batch on its way. It carries all that its end hooks read, since the loop is at later batches by then."""

    number: int
    """The how-manieth of the run, over all dataloaders."""
    batch: Any
    batch_idx: int
    dataloader_idx: int
    is_last: bool
    lengths: Lengths | None = None
    store: bool = False
    hook_args: tuple[Any, ...] = ()
    batch_indices: Any = None
    ready: int = 0
    """What the counter `ready` showed in its step."""


class PipelinedPredictionLoop(_PredictionLoop):
    """Lightning's prediction loop with several batches under way at once."""

    config: InferenceConfig
    _graphs: StepGraphs | None  # kept from run to run
    _buckets: Buckets | None  # likewise
    _trace: Trace | None  # of the run
    _tuner: DepthTuner | None  # likewise
    _pinned: int  # tensors of a traced run that went through pinned memory
    _copies: int  # all of its tensors
    trainer: Any  # Lightning sets most of the attributes read here without declaring them.
    batch_progress: Any
    _combined_loader: Any

    @classmethod
    def take_over(cls, loop: _PredictionLoop, config: InferenceConfig) -> None:
        """Turn a trainer's own loop into this class, in place.

        A new object would lose what the trainer has attached to the loop when the accelerator is set up: data source,
        `return_predictions`, totals of earlier runs (Lightning `trainer.py`).
        """
        loop.__class__ = cls
        state = loop.__dict__
        if state.get("config") is not config:
            buckets = Buckets(config) if config.bucket_lengths else None
            state.update(config=config, _graphs=None, _buckets=buckets, _trace=None, _tuner=None, _pinned=0, _copies=0)

    def release_graphs(self) -> None:
        """Free the device memory that graphs hold between runs."""
        if self._graphs is not None:
            self._graphs.release()
        self._graphs = None

    @property
    def graph_counts(self) -> GraphCounts | None:
        """What graphs did in the newest run; None where there are none."""
        return None if self._graphs is None else self._graphs.counts

    def run(self) -> Any:
        """Predict every batch. Without `pipelining` everything happens in stock Lightning's order."""
        # A step that pulls its own batches cannot be fed.
        pulls = pulls_batches(self.trainer.lightning_module)
        if pulls and self.config.trace is not None:
            rank_zero_warn("`trace` has no effect: `predict_step` pulls its batches itself, stage by stage unseen.")
        recorded = self._recorded() if self.config.trace is not None and not pulls else nullcontext()
        with recorded, self._on_device():
            return super().run() if pulls else self._run()

    def setup_data(self) -> None:
        """Make the dataloaders, and put their samples in order of length if asked to."""
        super().setup_data()
        by = self.config.group_by_length
        self._reordered = []
        if by is not None and not self.skip:
            loaders = zip(self._combined_loader.flattened, self.max_batches, strict=True)
            self._reordered = [Reordered(loader, batches, by) for loader, batches in loaders]
        if self._buckets is not None:
            self._buckets.start([length for loader in self._reordered for length in loader.longest])

    def reset(self) -> None:
        """Begin a run."""
        super().reset()
        if self._reordered:
            # Stock Lightning's loop only appends to each of them.
            self._predictions = list[Any](self._reordered)

    def on_run_end(self) -> Any:
        """End a run: everything that a hook or the user sees of it is in the dataset's order again."""
        if self._reordered:
            self._predictions = [loader.predictions() for loader in self._reordered]
            if any(self.epoch_batch_indices):
                self.epoch_batch_indices = [loader.batch_indices() for loader in self._reordered]
            self._reordered = []  # they hold every prediction
        if self._graphs is not None and self._graphs.counts.captures:
            rank_zero_info(str(self._graphs.counts))
        if self._tuner is not None:
            rank_zero_info("\n".join(self._tuner.summary()))
        return super().on_run_end()

    @property
    def _stages(self) -> bool:
        """Whether inputs go through pinned memory."""
        return self.config.async_copy and bool(self.trainer.strategy.root_device.type == _habana.DEVICE_TYPE)

    @_no_grad_context
    def _run(self) -> Any:
        self.setup_data()
        if self.skip:
            return None
        self.reset()
        self.on_run_start()
        if self._graphs is not None:
            self._graphs.expect(sum(self.max_batches))
        depth, trace = self._depth(), self._trace
        self._tuner = None
        if self.config.pipelining == "auto":
            self._tuner = DepthTuner(Depths(depth, self.config.in_flight), self.config.depth_memory)
        self._hooks = BatchHooks(self.trainer, threaded=depth > 0, trace=trace)
        self._output_buffers = PinnedBuffers() if self.config.async_output else None
        device = self.trainer.strategy.root_device
        self._fetch = to_host
        if trace is not None and not self.config.pipelining and device.type == _habana.DEVICE_TYPE:
            # Pipelined, outputs are fetched when they are retired.
            self._fetch = partial(fetched, device=device, trace=trace.main)
        # Grad and inference mode are per thread.
        mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
        try:
            # Stock Lightning ends a run quietly too when a step or a hook raises it.
            with suppress(StopIteration), Prefetcher(self._prepared_batches(depth), depth, mode) as prepared:
                (self._predict_pipelined if self.config.pipelining else self._predict_in_order)(prepared)
        finally:
            self._restarting = False
            del self._hooks, self._output_buffers, self._fetch
        return self.on_run_end()

    def _predict_in_order(self, prepared: Iterator[_Batch]) -> None:
        """The order of stock Lightning: a batch is finished before the next one is fetched."""
        for item in prepared:
            # Without a name for the output, so that it is gone from the device before the next step.
            self._finish(item, self._cut(self._step(item), item.lengths))

    def _predict_pipelined(self, prepared: Prefetcher[_Batch]) -> None:
        """The order of the stages: batches are prepared ahead, launched, and retired behind."""
        loader, tuner = 0, self._tuner
        following: Iterator[_Batch] = prepared
        if self._trace is not None and prepared.depth:
            following = iter(self._trace.main.wrap(Stage.WAIT_INPUT, partial(next, prepared)), None)
        in_flight = InFlight(self._launch, self.config.in_flight)
        try:
            warm = not self.config.warm_up
            began = perf_counter()
            while (item := self._next(following, in_flight)) is not None:
                waited = perf_counter() - began
                if not warm:
                    warm = True
                    self._warm_up(item)
                if item.dataloader_idx != loader:
                    # Progress bars start anew with a loader's first start hook.
                    self._drain(in_flight)
                    loader = item.dataloader_idx
                if tuner is not None:
                    tuner.launched(waited=waited, nbytes=size_of(item.batch))
                try:
                    in_flight.launch(item)
                except StopIteration:
                    break
                while in_flight.overdue:
                    self._retire(in_flight)
                if tuner is not None:
                    prepared.deepen(tuner.depths.prefetch)
                    in_flight.depth = tuner.depths.in_flight
                began = perf_counter()
            self._drain(in_flight)
        finally:
            # An error's traceback holds this frame and so this object; what was in flight must not live as long.
            in_flight.clear()

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Record the run, and write what limited it."""
        with TracedRun(self.config, self.trainer) as traced:
            self._trace = traced.trace
            self._pinned = self._copies = 0
            try:
                yield
            finally:
                self._trace = None
            try:
                self._report(traced)
            except Exception as error:
                # Predictions that may have taken hours are not lost for a full disk.
                rank_zero_warn(f"The trace of this run could not be written to {self.config.trace}: {error!r}")

    def _report(self, traced: TracedRun) -> None:
        report = traced.finish(self._counters(), self._tuner)
        if report is not None:
            self.trainer.accelerator.report = report
            ranks = self.trainer.world_size
            folder = Path(self.config.trace or "")
            traced.write(report, folder / f"rank{self.trainer.global_rank}" if ranks > 1 else folder)

    def _counters(self) -> Counters:
        graphs, buckets = self.graph_counts, self._buckets
        return Counters(
            captures=graphs.captures if graphs else 0,
            replays=graphs.replays if graphs else 0,
            plain_calls=graphs.plain_calls if graphs else 0,
            plain_reasons=dict(graphs.reasons) if graphs else {},
            evictions=graphs.evictions if graphs else 0,
            verified=graphs.verified if graphs else 0,
            padded_elements=buckets.padded if buckets else 0,
            real_elements=buckets.real if buckets else 0,
            pinned_copies=self._pinned,
            copies=self._copies,
        )

    def _next(self, prepared: Iterator[_Batch], in_flight: InFlight[_Batch]) -> _Batch | None:
        try:
            return next(prepared, None)
        except Exception:
            # In stock Lightning the batches before the faulty one are finished by then.
            self._drain(in_flight)
            raise

    def _depth(self) -> int:
        """Batches to prepare ahead: none where the step changes torch's default dtype, which is process-wide.

        Lightning does so for true half and double precision (`plugins/precision/half.py`); a dataset in a thread
        would make tensors of that dtype or not, by chance.
        """
        before = torch.get_default_dtype()
        with self.trainer.precision_plugin.predict_step_context():
            if torch.get_default_dtype() != before:
                return 0
        return self.config.ahead(self.trainer.strategy.root_device.type)

    def _drain(self, in_flight: InFlight[_Batch]) -> None:
        while in_flight:
            self._retire(in_flight)

    def _prepared_batches(self, depth: int) -> Iterator[_Batch]:
        """Host batches, ready to be copied. Advancing this iterator is the prefetching thread's work."""
        fetcher, convert = self._data_fetcher, self._hooks.before_transfer
        assert fetcher is not None
        stages, buckets = self._stages, self._buckets
        ahead = self.config.pipelining
        owns = [ahead and _may_reuse_memory(loader) for loader in self._combined_loader.flattened]
        prepares = convert is not None or buckets is not None or any(owns)

        def prepare(batch: Any, dataloader_idx: int) -> tuple[Any, Lengths | None]:
            if owns[dataloader_idx]:
                batch = own(batch)
            if convert is not None:
                batch = convert(batch, dataloader_idx)
            return (batch, None) if buckets is None else buckets.pad(batch)

        # `iter(fetcher)` would start the dataloaders again.
        fetch: Hook = partial(next, fetcher)
        pin: Hook = stage
        lane = None
        if self._trace is not None:
            lane = self._trace.prefetch if depth else self._trace.main
            fetch, prepare, pin = (
                lane.wrap(Stage.FETCH, fetch),
                lane.wrap(Stage.PREPARE, prepare),
                lane.wrap(Stage.PIN, pin),
            )
        for number in count():
            if lane is not None:
                lane.batch = number
            try:
                batch, batch_idx, dataloader_idx = fetch()
                is_last, lengths = fetcher.done, None
                if not ahead:
                    self.batch_progress.is_last_batch = is_last
                if prepares:
                    batch, lengths = prepare(batch, dataloader_idx)
                if stages and lane is None:
                    batch = pin(batch)
                elif stages:
                    host, batch = tensors_of(batch), pin(batch)
                    # A tensor that stays the same is one that cannot be copied from pinned memory.
                    self._pinned += sum(one is not other for one, other in zip(host, tensors_of(batch), strict=True))
                    self._copies += len(host)
            except StopIteration:
                # Whoever raises it, as in stock Lightning.
                return
            yield _Batch(number, batch, batch_idx, dataloader_idx, is_last, lengths)

    def _launch(self, item: _Batch) -> PendingOutput:
        """Enqueue one batch without waiting for the device."""
        output = self._step(item)
        wanted = item.store
        if self.config.defer_hooks:
            wanted |= self._hooks.end_reads_outputs
        else:
            output = self._cut(output, item.lengths)
            self._end(item, output)
        trace = None if self._trace is None else self._trace.main
        device = self.trainer.strategy.root_device
        return PendingOutput(output, device, fetch=wanted, buffers=self._output_buffers, trace=trace)

    def _step(self, item: _Batch) -> Any:
        """Stock Lightning's step up to its end hooks."""
        hooks, progress, dataloader_idx = self._hooks, self.batch_progress, item.dataloader_idx
        if self._trace is not None:
            self._trace.main.batch = item.number
        progress.is_last_batch = item.is_last
        batch = hooks.to_device(item.batch, dataloader_idx)
        item.batch = None
        progress.increment_ready()
        any_on_epoch = hooks.reads_indices and self._store_data_for_prediction_writer(item.batch_idx, dataloader_idx)
        item.store = self._return_predictions or any_on_epoch
        item.batch_indices, item.ready = self.current_batch_indices, progress.current.ready

        item.hook_args = (
            (batch, item.batch_idx, dataloader_idx) if self.num_dataloaders > 1 else (batch, item.batch_idx)
        )
        hooks.start(*item.hook_args)
        progress.increment_started()
        output = hooks.step(*item.hook_args)
        if output is None:
            self._warning_cache.warn("predict returned None if it was on purpose, ignore this warning...")
        progress.increment_processed()
        return output

    def _retire(self, in_flight: InFlight[_Batch]) -> None:
        """Wait for the oldest batch's output and finish the batch."""
        began = perf_counter()
        item, output = in_flight.retire()
        if self._tuner is not None:
            self._tuner.retired(blocked=perf_counter() - began, nbytes=size_of(output))
        if not self.config.defer_hooks:
            self._store(item, output)
            return
        # Later batches were launched since. `BasePredictionWriter` reads the indices, and other callbacks the counters,
        # from the loop when they are called. After an error the earlier moment stays in view.
        progress, current = self.batch_progress, self.batch_progress.current
        newest = progress.is_last_batch, self.current_batch_indices
        # Not all the same where a step has raised `StopIteration`.
        later = current.ready - item.ready, current.started - item.ready, current.processed - item.ready
        progress.is_last_batch, self.current_batch_indices = item.is_last, item.batch_indices
        self._count(-later[0], -later[1], -later[2])
        self._finish(item, self._cut(output, item.lengths))
        progress.is_last_batch, self.current_batch_indices = newest
        self._count(*later)

    def _count(self, ready: int, started: int, processed: int) -> None:
        """Add to the counters that hooks read; `completed` stays, since it counts end hooks that have run."""
        for tracker in (self.batch_progress.current, self.batch_progress.total):
            tracker.ready += ready
            tracker.started += started
            tracker.processed += processed

    def _cut(self, output: Any, lengths: Lengths | None) -> Any:
        return output if self._buckets is None or lengths is None else self._buckets.cut(output, lengths)

    def _warm_up(self, item: _Batch) -> None:
        """Run the step with the first batch in every bucket, so that each has its graph before the run begins.

        No hook but those of the transfer sees it, and its outputs are dropped.
        """
        hooks, buckets = self._hooks, self._buckets
        assert buckets is not None
        chosen = buckets.chosen or []
        if not chosen:
            rank_zero_warn(
                "`warm_up=True`: the buckets are not known before the first run, so there are none to warm up."
            )
        # Plainly, captured, and each replay that is verified.
        times = 2 + self.config.verify_graphs
        quiet = self.trainer.progress_bar_callback is None or not self.trainer.is_global_zero
        args = (item.batch_idx, item.dataloader_idx) if self.num_dataloaders > 1 else (item.batch_idx,)
        with torch.random.fork_rng(devices=[]):
            for length in tqdm(chosen[::-1], desc="Warming up", unit="bucket", disable=quiet):
                batch = own(buckets.spec.pad(buckets.spec.narrow(item.batch, length), length))
                for _ in range(times):
                    host = stage(batch) if self._stages else batch
                    hooks.step(hooks.to_device(host, item.dataloader_idx), *args)

    def _finish(self, item: _Batch, output: Any) -> None:
        self._end(item, output)
        self._store(item, output)

    def _end(self, item: _Batch, output: Any) -> None:
        self._hooks.end(output, *item.hook_args)
        self.batch_progress.increment_completed()
        item.hook_args = ()

    def _store(self, item: _Batch, output: Any) -> None:
        if item.store:
            self._predictions[item.dataloader_idx].append(self._fetch(output))

    def _on_before_fetch(self) -> None:
        self.trainer.profiler.start(_FETCH_SPAN)

    def _on_after_fetch(self) -> None:
        self.trainer.profiler.stop(_FETCH_SPAN)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Put graphs and step markers into the strategy's `predict_step`.

        It is shadowed on the object, so that this works with whichever strategy there is.
        """
        strategy = self.trainer.strategy
        if "predict_step" in vars(strategy):
            # A run inside a run, as of `BatchSizeFinder`.
            yield
            return
        graphs = self._graphs_of_run()
        step, context = step_of(strategy)
        trace = None if self._trace is None else self._trace.main
        with graphs.attached(step, trace) if graphs is not None else nullcontext(step) as graphed:
            vars(strategy)["predict_step"] = DeviceStep(_inside(context, graphed), strategy.root_device)
            try:
                yield
            finally:
                del strategy.predict_step

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


def _inside(context: Callable[[], AbstractContextManager[Any]] | None, step: Hook) -> Hook:
    """A step that runs inside of the precision plugin's context, which is never traced."""
    if context is None:
        return step

    def call(*args: Any, **kwargs: Any) -> Any:
        with context():
            return step(*args, **kwargs)

    return call


# Stock Lightning's name, which its own tools and users' filters look for.
_FETCH_SPAN = f"[{_PredictionLoop.__name__}].predict_next"


def _may_reuse_memory(loader: object) -> bool:
    """Whether a loader may hand out the same memory for every batch; a `DataLoader` that collates makes new tensors."""
    return not isinstance(loader, DataLoader) or loader.collate_fn is default_convert
