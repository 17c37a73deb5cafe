"""The engine: batches are launched on the device and retired in order, some batches behind. Needs no Trainer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.graphs import StepGraphs, graph_kind
from lightning_hpu_infer.ownership import may_reuse_memory, owned
from lightning_hpu_infer.postprocess import Postprocess
from lightning_hpu_infer.prefetch import Prefetcher
from lightning_hpu_infer.step import DeviceStep
from lightning_hpu_infer.transfer import AsyncOutputs, PendingOutput, pin

T = TypeVar("T")
_END: Any = object()


class InFlight(Generic[T]):
    """The batches that were launched and not yet retired, oldest first.

    Launching batch k+1 before the output of batch k is fetched keeps the device busy, since fetching waits for
    batch k only (bridge `device.cpp`: a copy to the host waits for the producer of its own source).

    Args:
        launch: Enqueues the work of one item and returns its output without waiting for the device.
        depth: Items that may stay in flight behind the newest.
    """

    def __init__(self, launch: Callable[[T], PendingOutput], depth: int) -> None:
        self._launch = launch
        self.depth = depth
        self._pending: deque[tuple[T, PendingOutput]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def over_capacity(self) -> bool:
        """Whether the oldest item has to be retired before another may be launched."""
        return len(self._pending) > self.depth

    def launch(self, item: T) -> None:
        """Enqueue an item. Does not wait."""
        self._pending.append((item, self._launch(item)))

    def retire(self) -> tuple[T, Any]:
        """Wait for the oldest item; returns it with its output. This is the only wait.

        Raises:
            IndexError: If nothing is in flight.
        """
        if not self._pending:
            raise IndexError("Nothing is in flight: every batch that was pushed has been popped. Push one first.")
        item, output = self._pending.popleft()
        return item, output.result()

    def clear(self) -> None:
        """Forget what is in flight."""
        while self._pending:
            self._pending.popleft()[1].drop()


class _Stream:
    """Batches that were launched, in flight first, and then post-processed. Oldest first.

    Raises:
        TypeError: If `postprocess` cannot be sent to other processes.
    """

    def __init__(self, launch: Callable[[Any], PendingOutput], depth: int, config: InferenceConfig) -> None:
        self.in_flight = InFlight(launch, depth)
        self.postprocess = Postprocess[str](config, torch.inference_mode)
        self._retired = 0

    def __len__(self) -> int:
        return len(self.in_flight) + len(self.postprocess)

    def retire(self) -> None:
        """Wait for the output that was launched first, and have it post-processed."""
        with torch.inference_mode():
            _, output = self.in_flight.retire()
        self.postprocess.submit(f"batch {self._retired}", output, self._retired)
        self._retired += 1

    def take(self) -> Any:
        """Wait for what was retired first."""
        with torch.inference_mode():
            return self.postprocess.take()[1]

    def results(self, depth: int) -> Iterator[Any]:
        """Retire until so many are in flight, and take what there is no place for then."""
        while len(self.in_flight) > depth:
            self.retire()
            while self.postprocess.over_capacity:
                yield self.take()

    def close(self) -> None:
        """Drop all of it."""
        self.in_flight.clear()
        self.postprocess.close()


class InferencePipeline:
    """Prediction with graphs, non-blocking copies and pipelining, without a Trainer.

    Args:
        model: Takes one batch and returns any collection of tensors. It is moved to `device` and set to eval mode.
        device: An HPU if there is one, else the CPU.
        config: The same flags as `HPUInferenceAccelerator`'s; by default all techniques are on.
        max_pending: Batches that may be pushed and not popped, 1 or more: each takes the device memory of a batch and
            its output.
        when_full: What one more does: "raise" an error, or "wait" until the oldest output has arrived, which then takes
            host memory until it is popped.

    Raises:
        TypeError: If `postprocess` cannot be sent to other processes.
        ValueError: If `config` has an option that needs a Trainer's dataloaders, or another value is out of its range.

    Example::

        with InferencePipeline(model) as pipeline:
            for output in pipeline.predict(batches):   # in order, on the host
                ...

        with InferencePipeline(model) as pipeline:     # or by hand, where batches come one by one
            pipeline.push(first)
            pipeline.push(second)                      # the device works on `first` meanwhile
            output = pipeline.pop()                    # of `first`
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        config: InferenceConfig | None = None,
        *,
        max_pending: int = 64,
        when_full: Literal["raise", "wait"] = "raise",
    ) -> None:
        self.config: InferenceConfig = config if config is not None else InferenceConfig()
        if max_pending < 1:
            raise ValueError(f"`max_pending` must be 1 or more, got {max_pending!r}.")
        if when_full not in ("raise", "wait"):
            raise ValueError(f"`when_full` must be 'raise' or 'wait', got {when_full!r}.")
        for name in ("bucket_lengths", "group_by_length", "trace"):
            if getattr(self.config, name) is not None:
                raise ValueError(f"`{name}` needs a Trainer, got {getattr(self.config, name)!r}. Leave it out here.")
        if self.config.pipelining == "auto":
            raise ValueError("`pipelining='auto'` needs a Trainer. Choose `prefetch` and `in_flight` here.")
        self.device: torch.device = torch.device(device or (_habana.DEVICE_TYPE if _habana.is_available() else "cpu"))
        self._on_hpu = self.device.type == _habana.DEVICE_TYPE
        self._depth = self.config.in_flight_depth(self.device.type)
        self._pushed = _Stream(self._launch, max_pending - 1, self.config)
        kind = graph_kind(self.device, self.config)
        model = model.eval().to(self.device)
        self._attached = ExitStack()
        step: Callable[..., Any] = model
        if kind is not None:
            graphs = StepGraphs(model, self.device, self.config, kind)
            self._attached.callback(graphs.release)
            step = self._attached.enter_context(graphs.attached(model))
        self._step = DeviceStep(step, self.device)
        self._async_outputs = AsyncOutputs() if self.config.pipelining and self.config.async_output else None
        self._when_full = when_full
        self._closed = False

    def __enter__(self) -> "InferencePipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._pushed)

    def close(self) -> None:
        """Forget what was pushed, release the graphs and leave the model as it was."""
        self._closed = True
        self._pushed.close()
        self._attached.close()

    def push(self, batch: Any) -> None:
        """Launch a batch of host tensors, whose memory may be filled again afterwards. Does not wait for the device.

        Raises:
            RuntimeError: If the pipeline is closed, or full and not told to wait then.
        """
        in_flight = self._pushed.in_flight
        if in_flight.over_capacity:
            if self._when_full == "raise":
                raise RuntimeError(
                    f"The pipeline is full: {len(in_flight)} batches were pushed and not popped (`max_pending`). Pop"
                    " the oldest first, or pass `when_full='wait'`."
                )
            self._pushed.retire()
        in_flight.launch(self._prepare(batch, reused=self._on_hpu))

    def pop(self) -> Any:
        """Wait for the oldest batch pushed and return its output with host tensors, or what `postprocess` returned.

        Raises:
            IndexError: If every batch pushed was popped.
        """
        in_flight, postprocess = self._pushed.in_flight, self._pushed.postprocess
        while not postprocess or (len(in_flight) > self._depth and len(postprocess) < postprocess.depth):
            self._pushed.retire()
        return self._pushed.take()

    def predict(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Outputs of `batches` in order, with host tensors, or what `postprocess` returned.

        Later batches are prepared and launched meanwhile.

        Batches that were pushed by hand are not among them. An error, of `batches` or of the model, is raised after the
        outputs of all batches before it. A generator that is closed early drops what is in flight.

        Raises:
            RuntimeError: If the pipeline is closed.
        """
        stream = _Stream(self._launch, self._depth, self.config)
        ahead = self.config.prefetch_depth(self.device.type)
        # On the CPU a batch is done with when it is launched.
        reused = may_reuse_memory(batches) and (self._on_hpu or ahead > 0)
        prepare = partial(self._prepare, reused=reused)
        failed: Exception | None = None
        with closing(stream):
            with Prefetcher(map(prepare, batches), ahead, torch.inference_mode) as prepared:
                while failed is None:
                    try:
                        if (batch := next(prepared, _END)) is _END:
                            break
                        stream.in_flight.launch(batch)
                    except Exception as error:
                        failed = error
                    yield from stream.results(self._depth)
            yield from stream.results(0)
            while stream:
                yield stream.take()
        if failed is not None:
            raise failed

    def _prepare(self, batch: Any, *, reused: bool) -> Any:
        """The batch in memory that the device reads by itself, and that its owner does not write if it may."""
        if self.config.async_copy and self._on_hpu:
            return pin(batch, owns=reused)
        return owned(batch) if reused else batch

    def _launch(self, batch: Any) -> PendingOutput:
        if self._closed:
            raise RuntimeError("This pipeline is closed: make another one.")
        with torch.inference_mode():
            output = self._step(move_data_to_device(batch, self.device))
            return PendingOutput(output, self.device, asynchronous=self._async_outputs)
