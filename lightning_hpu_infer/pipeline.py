"""`InferencePipeline`: prediction without a Trainer, of batches that come one after the other or from many threads."""

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.ahead import has_modes, reason_against
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.engine import Engine
from lightning_hpu_infer.lengths.buckets import Buckets, NoBuckets
from lightning_hpu_infer.lengths.window import InOrder, longest_first
from lightning_hpu_infer.observe.report import Report
from lightning_hpu_infer.observer import Lane, Stage
from lightning_hpu_infer.ownership import may_reuse_memory
from lightning_hpu_infer.prefetch import Prefetcher
from lightning_hpu_infer.prepare import Preparation
from lightning_hpu_infer.tuning import Depths, DepthTuner
from lightning_hpu_infer.work import CLOSED, Room, Work

_NONE: Any = object()


class InferencePipeline:
    """Prediction with graphs, non-blocking copies and pipelining, without a Trainer.

    All device work happens in one thread of the pipeline's own. Its methods may be called by any thread.

    Batches are collections of host tensors, of NumPy arrays, or Arrow's record batches and tables, which the model gets
    as tensors. Results are on the host, or what `postprocess` returned.

    Args:
        model: A module that takes one batch and returns any collection of tensors; a LightningModule, of which
            `predict_step` and the transfer hooks are used; or a function without arguments that makes one of these in
            the pipeline's thread. It is moved to `device` and set to eval mode.
        device: An HPU if there is one, else the CPU.
        config: The same flags as `HPUInferenceAccelerator`'s; by default all techniques are on.
        precision: "32-true", "bf16-mixed" or "16-mixed", as for a Trainer.
        max_pending: Batches that may be submitted and not computed, 1 or more: each takes the host memory of a batch.
        when_full: What one more does: "wait" until there is room, or "raise" an error.

    Raises:
        Exception: Whatever the function that makes the model raises.
        MisconfigurationException: If there is no HPU and `device` is one, or it cannot do what `hpu_graphs` asks for.
        TypeError: If there is no module, or `postprocess` cannot be sent to other processes.
        ValueError: If `config` has an option that needs a Trainer's dataloaders, or another value is out of its range.

    Example::

        with InferencePipeline(model) as pipeline:
            for output in pipeline.predict(batches):   # in order
                ...

        with InferencePipeline(model) as pipeline:     # from any thread
            future = pipeline.submit(batch)
            output = future.result()
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        device: torch.device | str | None = None,
        config: InferenceConfig | None = None,
        *,
        precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
        max_pending: int = 64,
        when_full: Literal["wait", "raise"] = "wait",
    ) -> None:
        self.config: InferenceConfig = config if config is not None else InferenceConfig()
        if max_pending < 1:
            raise ValueError(f"`max_pending` must be 1 or more, got {max_pending!r}.")
        if when_full not in ("raise", "wait"):
            raise ValueError(f"`when_full` must be 'raise' or 'wait', got {when_full!r}.")
        if self.config.group_by_length is not None and self.config.lengths is None:
            raise ValueError(
                f"`group_by_length` needs a Trainer, got {self.config.group_by_length!r}. Pass `window` to `predict`,"
                " which puts batches in order of length."
            )
        self.device: torch.device = torch.device(device or (_habana.DEVICE_TYPE if _habana.is_available() else "cpu"))
        self._on_hpu = self.device.type == _habana.DEVICE_TYPE
        if self._on_hpu and not _habana.is_available():
            raise MisconfigurationException(
                f"`device={str(device)!r}`, and there is no HPU here. On a Gaudi machine, install Habana's PyTorch"
                " bridge; elsewhere pass `device='cpu'`, or set LIGHTNING_HPU_INFER_EMULATOR=1 to try it without one."
            )
        self._max_pending = max_pending
        self._when_full = when_full
        self._pushed: deque[Future[Any]] = deque()
        self._buckets = Buckets(self.config) if self.config.bucket_lengths else NoBuckets()
        self._indices, self._submitted = count(), count()
        engine = self._engine = Engine(model, self.device, self.config, precision, self._buckets)
        self._room = Room(max_pending, when_full, engine)
        pins = self.config.async_copy and self._on_hpu
        self._prepare = Preparation(engine.model.convert, self._buckets, engine.observer, pins=pins)
        # Who keeps futures only still gets their results.
        weakref.finalize(self, engine.close, wait=False).atexit = False

    def __enter__(self) -> "InferencePipeline":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def __len__(self) -> int:
        return len(self._pushed)

    @property
    def closed(self) -> bool:
        """Whether nothing can be submitted any more."""
        return self._engine.closed

    @property
    def module(self) -> nn.Module:
        """What it runs, which belongs to its thread."""
        return self._engine.model.module

    @property
    def report(self) -> Report | None:
        """What limited all that the pipeline did, once it is closed, if `trace` asked for it."""
        return self._engine.report

    def close(self, *, cancel: bool = False) -> None:
        """Compute what was submitted and release the graphs. May be called again.

        The model stays in eval mode and on the device, with nothing of the pipeline's on it.

        Threads that wait for room in `submit` get an error.

        Args:
            cancel: Cancel the batches that were not launched, and wait for the others for ten seconds at most.
        """
        if self._engine.is_forked:
            return
        self._engine.close(cancel=cancel, wait=False)
        self._room.look_again()
        self._engine.close(cancel=cancel)

    # Single batches

    def submit(self, batch: Any) -> "Future[Any]":
        """Have a batch computed after those before it; its memory may be filled again afterwards.

        Whatever goes wrong with it reaches its future, and no other. A future that is cancelled is not computed if that
        has not begun. Callbacks of futures run in the pipeline's thread, and must not wait for other futures.

        Returns:
            Its result, to come.

        Raises:
            RuntimeError: If the pipeline is closed; if it is full and does not wait; if this thread has modes that the
                pipeline's has not; or if this process was forked after the pipeline was made.
        """
        self._check_caller()
        self._room.enter()
        index, future = next(self._indices), self._engine.result()
        work = Work(index, batch, next(self._submitted), on_end=self._room.leave, future=future)
        try:
            self._prepare(work)
            self._engine.submit(work)
        except Exception as error:
            if self.closed:
                self._room.leave()
                raise
            work.fail(error)
        except BaseException:
            self._room.leave()
            raise
        return work.future

    def push(self, batch: Any) -> None:
        """Submit a batch whose result `pop` will return.

        Raises:
            RuntimeError: As `submit` does; and with `when_full="raise"` if `max_pending` results were not popped.
        """
        if self._when_full == "raise" and len(self._pushed) >= self._max_pending:
            raise RuntimeError(
                f"The pipeline is full: {len(self._pushed)} batches were pushed and not popped (`max_pending`). Pop"
                " the oldest first, or pass `when_full='wait'`."
            )
        self._pushed.append(self.submit(batch))

    def pop(self) -> Any:
        """Wait for the oldest batch pushed and return its result, or raise its error.

        Raises:
            IndexError: If every batch pushed was popped.
            RuntimeError: If the batch was cancelled as the pipeline was closed, this process was forked, or this is the
                pipeline's own thread, in which callbacks of futures run.
        """
        if not self._pushed:
            raise IndexError("Nothing is in flight: every batch that was pushed has been popped. Push one first.")
        self._engine.check_process()
        _wait(self._pushed[0])  # which stays the oldest if this is interrupted
        return _result(self._pushed.popleft())

    # Many batches

    def predict(self, batches: Iterable[Any], *, window: int = 1) -> Iterator[Any]:
        """Results of `batches` in order, while later batches are prepared and computed.

        Their number is bounded by `prefetch` and `in_flight`. An error, of `batches` or of the model, is raised after
        the results of all batches before it. A generator that is closed early cancels the batches that it is ahead.

        Batches are asked for before your loop has had the results of those before them. Where what it does decides what
        comes next, pass `prefetch=0` and `in_flight=0` in the config, or call `submit`.

        Args:
            batches: Any iterable, also an endless one. A thread asks for them if `prefetch`.
            window: Of so many batches at a time the longest is computed first, and so on. More than 1 needs `pad_spec`,
                which tells a batch's length.

        Raises:
            RuntimeError: If the pipeline is closed, this thread has modes that the pipeline's has not, or is the
                pipeline's own; or if this process was forked after the pipeline was made.
            ValueError: If `window` is out of its range, or there is no `pad_spec`.
        """
        if window < 1:
            raise ValueError(f"`window` must be 1 or more, got {window!r}.")
        if window > 1 and not self._buckets.pads:
            raise ValueError(
                "`window` puts batches in order of length, which `pad_spec` tells: pass `lengths='auto'`, or"
                " `bucket_lengths` with a `pad_spec`."
            )
        self._check_caller()
        if self.closed:
            raise RuntimeError(CLOSED)
        return self._predict(batches, window)

    def _predict(self, batches: Iterable[Any], window: int) -> Iterator[Any]:
        """The order of the stages: batches are prepared ahead, submitted, and their results taken behind."""
        engine, results = self._engine, InOrder()
        overlaps = self._may_overlap(batches)
        depth = self.config.prefetch_depth(self.device.type) if overlaps else 0
        ends: list[BaseException] = []
        prepared = Prefetcher(_noting(self._prepared(batches, window), ends), depth, torch.inference_mode)
        taken: deque[tuple[int, Future[Any]]] = deque()
        failed: BaseException | None = None
        with self._tuned(prepared) if overlaps else nullcontext(lambda: None) as tune:
            try:
                with prepared:
                    while failed is None:
                        try:
                            if (item := next(prepared, _NONE)) is _NONE:
                                break
                            place, work = item
                            if not work.future.done():
                                engine.submit(work)
                            taken.append((place, work.future))
                        except BaseException as error:
                            if not isinstance(error, Exception) and not any(error is end for end in ends):
                                raise  # Ctrl-C, while this thread waits
                            failed = error
                        tune()
                        while len(taken) > (engine.ahead if overlaps else 0):
                            yield from results.add(*_awaited(*taken.popleft()))
                while taken:
                    yield from results.add(*_awaited(*taken.popleft()))
            finally:
                for _, future in taken:
                    future.cancel()
        if failed is not None:
            raise failed

    def _may_overlap(self, batches: Iterable[Any]) -> bool:
        """Whether batches may be prepared before the steps of earlier ones have run, as far as anything is known."""
        depth, tunes = self.config.prefetch_depth(self.device.type), self.config.tunes_depths(self.device.type)
        if self.config.prefetch or not (tunes or self._engine.ahead):
            return True  # whoever asks for the thread knows; or nothing is done ahead
        if isinstance(batches, list | tuple) and len(batches) < 2:
            return True  # a single batch, which many send one after the other: looking takes milliseconds
        if reason := reason_against([batches], [self._engine.model.module]):
            rank_zero_info(f"No batch is prepared ahead, since {reason}. Pass `prefetch={depth or 1}` if it may be.")
        return not reason

    def _prepared(self, batches: Iterable[Any], window: int) -> Iterator[tuple[int, Work]]:
        """The batches, ready for the device, with their places. Advancing this is the prefetch thread's work."""
        # Where nothing is done ahead, the device is done with a batch when the next one is asked for.
        reused = may_reuse_memory(batches) and (self._on_hpu or self._engine.ahead > 0 or window > 1)
        fetched = self._fetched(batches)
        if window > 1:
            fetched = ((index, self._prepare.convert(batch, index, owns=reused)) for index, batch in fetched)
        for place, (index, batch) in longest_first(fetched, window, lambda item: self._buckets.spec.length_of(item[1])):
            work = Work(index, batch, place, future=self._engine.result())
            try:
                self._prepare(work, converts=window == 1, owns=reused and window == 1)
            except BaseException as error:
                if window == 1:
                    raise
                work.fail(error)  # batches before it may come behind it
            yield place, work

    def _fetched(self, batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The batches with their indices among all of the pipeline."""
        iterator, observer = iter(batches), self._engine.observer
        while True:
            start = time.perf_counter()
            if (batch := next(iterator, _NONE)) is _NONE:
                return
            index = next(self._indices)
            observer.add(Stage.FETCH, Lane.PREFETCH, start, time.perf_counter(), index)
            yield index, batch

    @contextmanager
    def _tuned(self, prepared: Prefetcher[Any]) -> Iterator[Callable[[], object]]:
        """Let the depths rise while this run goes on, if they are not fixed; gives what sets those of this thread."""
        engine, watching = self._engine, self._engine.while_predicting
        if not self.config.tunes_depths(self.device.type) or watching.tuner is not None:
            yield lambda: None
            return
        first = Depths(prepared.depth, engine.depth)

        def apply(depths: Depths) -> None:
            engine.depth = depths.in_flight

        tuner = watching.tuner = watching.last = DepthTuner(
            first, self.config.depth_memory, apply=apply, content=_content
        )
        try:
            yield lambda: prepared.set_depth(tuner.depths.prefetch)
        finally:
            # For single batches greater depths only mean later results.
            watching.tuner, engine.depth = None, first.in_flight

    def _check_caller(self) -> None:
        """Refuse what would be computed otherwise in this thread, or never."""
        self._engine.check_process()
        if has_modes() or torch.is_autocast_enabled(self.device.type):
            raise RuntimeError(
                "`torch.autocast` or `torch.set_default_device` is on in this thread, but a pipeline computes in one of"
                " its own, which has neither. Pass `precision='bf16-mixed'`, or enter it in the model's `forward`."
            )


def _noting(batches: Iterator[tuple[int, Work]], ends: list[BaseException]) -> Iterator[tuple[int, Work]]:
    """The batches; takes down what ends them, in whichever thread that is."""
    try:
        yield from batches
    except BaseException as error:
        ends.append(error)
        raise


def _wait(future: "Future[Any]") -> None:
    """Wait until it is done, whatever comes of it."""
    with suppress(CancelledError):
        future.exception()


def _result(future: "Future[Any]") -> Any:
    try:
        return future.result()
    except CancelledError:
        if not future.cancelled():
            raise  # by the model
        raise RuntimeError(CLOSED) from None


def _content(work: Any) -> Any:
    """What of a submitted batch takes memory; nothing, of what says that there are no more."""
    return getattr(work, "batch", None)


def _awaited(place: int, future: "Future[Any]") -> tuple[int, Callable[[], Any]]:
    """A result that is there, for when its turn comes."""
    _wait(future)
    return place, partial(_result, future)
