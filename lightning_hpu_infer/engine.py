"""The engine of a pipeline: one thread that makes all device calls, for batches that any thread submits."""

import atexit
import contextvars
import os
import queue
import threading
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.graphs import GraphCounts, StepGraphs, graph_kind
from lightning_hpu_infer.in_flight import InFlight
from lightning_hpu_infer.lengths.buckets import Buckets
from lightning_hpu_infer.model_step import Model, ModelStep, model_step
from lightning_hpu_infer.observe.report import Counters, Report
from lightning_hpu_infer.observe.run import Totals, TracedRun
from lightning_hpu_infer.observer import Observer, Observers, Stage
from lightning_hpu_infer.postprocess import Postprocess
from lightning_hpu_infer.source import warm_up
from lightning_hpu_infer.step import DeviceStep, inside
from lightning_hpu_infer.transfer import AsyncOutputs, PendingOutput, pin
from lightning_hpu_infer.tuning import WhilePredicting
from lightning_hpu_infer.work import CLOSED, FORKED, Result, Work

_JOIN_SECONDS = 10.0
_END: Any = object()


class Engine:
    """Runs a model on the batches that are submitted, in their order, in a thread of its own.

    Everything that the device is asked for happens there: the model is made and moved, steps are launched, outputs
    fetched. `submit` and `close` are for any thread.

    A daemon: it ends with Python if it is not closed, after what was submitted has been computed.

    Args:
        model: See `model_step`.
        device: Where it runs.
        config: The options.
        precision: See `autocast`.
        buckets: Cuts the outputs of padded batches.

    Raises:
        Exception: Whatever goes wrong while the model is made and the device is set up.
    """

    def __init__(
        self, model: Model, device: torch.device, config: InferenceConfig, precision: str, buckets: Buckets
    ) -> None:
        self._device = device
        self._config = config
        self._precision = precision
        self._buckets = buckets
        self._on_hpu = device.type == _habana.DEVICE_TYPE
        self.while_predicting = WhilePredicting()
        """Where the tuner of a run of `predict` goes."""
        self.observer: Observer = Observer()
        """Observes the stages of this thread, and of those that prepare batches."""
        self.report: Report | None = None
        """What limited the run, once it is closed, if it was recorded."""
        self.model: ModelStep
        self._graphs: StepGraphs | None = None
        self._async_outputs = AsyncOutputs() if config.pipelining and config.async_output else None
        self._in_flight = InFlight(self._launched, config.in_flight_depth(device.type))
        self._postprocess: Postprocess[Work]
        # Holds batches, None where there is something to look after, and `_END` behind the last batch.
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._begun: set[Work] = set()
        self._warm = not config.warm_up
        self._lock = threading.Lock()
        self.closed = False
        """Whether nothing can be submitted any more."""
        self._cancels = False
        self._process = os.getpid()
        started: Future[None] = Future()
        # The context variables of whoever makes it hold in the thread too, as they would without one.
        run = partial(contextvars.copy_context().run, self._run, model, started)
        self._thread = threading.Thread(target=run, name="hpu-infer-pipeline", daemon=True)
        # Python ends before its exit handlers only threads that are no daemons, and waits for these.
        atexit.register(self.close)
        self._thread.start()
        try:
            started.result()
        except BaseException:
            self.close(cancel=True)
            raise

    @property
    def depth(self) -> int:
        """Batches that may be in flight behind the newest."""
        return self._in_flight.depth

    @depth.setter
    def depth(self, depth: int) -> None:
        self._in_flight.depth = depth

    @property
    def ahead(self) -> int:
        """Batches that are worth submitting behind one whose result is awaited."""
        under_way = self.depth + self._postprocess.depth
        # One more, so that there is always one to launch. Where a thread prepares batches it may as well be there.
        overlaps = under_way > 0 or self._config.prefetch_depth(self._device.type) > 0
        return under_way + 1 if overlaps else 0

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is this engine's thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def result(self) -> Result:
        """A future of this thread."""
        return Result(self._thread.ident)

    def check_process(self) -> None:
        """Refuse to wait for a thread that is not there.

        Raises:
            RuntimeError: If it is not.
        """
        if self.is_forked:
            raise RuntimeError(FORKED)

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked after the engine was made, and so lacks its thread."""
        return os.getpid() != self._process

    def submit(self, work: Work) -> None:
        """Have a batch computed after those before it. Does not wait.

        Raises:
            RuntimeError: If the engine is closed, or of another process.
        """
        self.check_process()
        with self._lock:
            if self.closed:
                raise RuntimeError(CLOSED)
            self._queue.put(work)

    def close(self, *, cancel: bool = False, wait: bool = True) -> None:
        """Take no more batches, and end. May be called again.

        Args:
            cancel: Whether batches that were not launched are cancelled; otherwise they are computed first.
            wait: Whether to wait for the end; in the engine's own thread nobody does. Where batches are cancelled, for
                ten seconds at most.
        """
        if self.is_forked:
            return  # its locks may be held by threads that are not there
        with self._lock:
            self._cancels |= cancel
            if not self.closed:
                self.closed = True
                self._queue.put(_END)
        if not wait or self.is_this_thread:
            return
        self._thread.join(_JOIN_SECONDS if self._cancels else None)
        if self._thread.is_alive():
            rank_zero_warn(
                f"The model did not return within {_JOIN_SECONDS:g} s after its pipeline was closed. The thread is left"
                " behind, and ends when the model returns."
            )

    # In the thread

    def _run(self, model: Model, started: "Future[None]") -> None:
        try:
            with ExitStack() as stack:
                try:
                    self._set_up(model, stack)
                except BaseException as error:
                    started.set_exception(error)
                    return
                started.set_result(None)
                with torch.inference_mode():
                    self._serve()
        finally:
            self._refuse_the_rest()
            atexit.unregister(self.close)

    def _set_up(self, model: Model, stack: ExitStack) -> None:
        """Make all that the stages need; what ends it goes on the stack."""
        trace = Observer()
        if self._config.trace is not None:
            keep = partial(setattr, self, "report")
            traced = TracedRun(self._config, self._device, self._totals, keep, precision=self._precision)
            trace = stack.enter_context(traced).trace
        observer = self.observer = Observers(trace, self.while_predicting)
        self.model = found = model_step(model, self._device, self._precision)
        kind = graph_kind(self._device, self._config)
        step = found.step
        if kind is not None:
            self._graphs = StepGraphs(found.module, self._device, self._config, kind)
            stack.callback(self._graphs.release)
            step = stack.enter_context(self._graphs.attached(step, observer))
        self._step = observer.wrap(Stage.LAUNCH, DeviceStep(inside(found.context, step), self._device))
        self._to_device = observer.wrap(Stage.COPY_IN, found.to_device)
        self._take = observer.wrap(Stage.WAIT_INPUT, self._next)
        wake = partial(self._queue.put, None)
        self._postprocess = stack.enter_context(
            Postprocess[Work](self._config, torch.inference_mode, observer, on_done=wake)
        )
        stack.callback(self._in_flight.clear)

    def _serve(self) -> None:
        """The order of the stages: batches are launched as they come, and retired behind.

        Nobody waits for a batch that may never come: where there is none, what is in flight is retired at once.
        """
        in_flight, postprocess = self._in_flight, self._postprocess
        for work in iter(self._take, _END):
            if work is not None:
                self._launch(work)
            elif in_flight:
                self._retire()
            while in_flight.over_capacity:
                self._retire()
            while postprocess.ready or postprocess.over_capacity:
                self._complete()
        while in_flight:
            self._retire()
        while postprocess:
            self._complete()

    def _next(self) -> Work | None:
        """The next batch; None if none has come while others are in flight, or one may have been post-processed."""
        try:
            return self._queue.get(block=not self._in_flight)
        except queue.Empty:
            return None

    def _launch(self, work: Work) -> None:
        """Enqueue a batch, if it is still wanted."""
        if self._cancels:
            work.cancel()
        elif work.begin():
            self._begun.add(work)
            try:
                self._in_flight.launch(work)
            except BaseException as error:
                self._fail(work, error)

    def _launched(self, work: Work) -> PendingOutput:
        """Enqueue the copy and the step of a batch; does not wait for the device."""
        self.observer.at(work.index)
        self._warm_up_once(work.batch)
        batch, work.batch = self._to_device(work.batch), None
        return PendingOutput(
            self._step(batch, work.batch_idx),
            self._device,
            asynchronous=self._async_outputs,
            observer=self.observer,
            batch=work.index,
        )

    def _retire(self) -> None:
        """Wait for the oldest batch's output, and have it post-processed."""
        work = self._in_flight.oldest
        try:
            _, output = self._in_flight.retire()
            self.observer.completed(output)
            self._postprocess.submit(work, self._buckets.cut(output, work.lengths), work.index)
        except BaseException as error:
            self._fail(work, error)

    def _complete(self) -> None:
        """Give the oldest result to whoever waits for it."""
        work = self._postprocess.oldest
        try:
            _, result = self._postprocess.take()
        except BaseException as error:
            self._fail(work, error)
        else:
            self._begun.discard(work)
            work.succeed(result)

    def _fail(self, work: Work, error: BaseException) -> None:
        self._begun.discard(work)
        work.fail(error)

    def _warm_up_once(self, batch: Any) -> None:
        if self._warm:
            return
        self._warm = True
        pins = self._config.async_copy and self._on_hpu

        def run(data: Any) -> None:
            self._step(self._to_device(pin(data) if pins else data), 0)

        warm_up(batch, self._buckets, run, times=2 + self._config.verify_graphs, quiet=True)

    def _refuse_the_rest(self) -> None:
        """Let nobody wait for batches that were not computed, whatever ended this."""
        with self._lock:
            self.closed = True
        for work in list(self._begun):
            self._fail(work, RuntimeError(f"The pipeline's thread ended before {work} was computed."))
        while not self._queue.empty():
            left = self._queue.get()
            if isinstance(left, Work):
                left.cancel()

    def _totals(self) -> Totals:
        counts = self._graphs.counts if self._graphs is not None else GraphCounts()
        counters = Counters(**counts.totals(), padded_elements=self._buckets.padded, real_elements=self._buckets.real)
        tuner = self.while_predicting.last
        return (counters, tuner.depths, tuner.summary()) if tuner is not None else (counters, None, ())
