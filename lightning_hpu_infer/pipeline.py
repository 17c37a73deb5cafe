"""The engine: batches are launched on the device and retired in order, some batches behind. Needs no Trainer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.graphs import StepGraphs, graph_kind
from lightning_hpu_infer.ownership import may_reuse_memory, owned
from lightning_hpu_infer.prefetch import Prefetcher
from lightning_hpu_infer.step import DeviceStep
from lightning_hpu_infer.transfer import AsyncOutputs, PendingOutput, pin

T = TypeVar("T")


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


class InferencePipeline:
    """Prediction with graphs, non-blocking copies and pipelining, without a Trainer.

    Args:
        model: Takes one batch and returns any collection of tensors. It is moved to `device` and set to eval mode.
        device: An HPU if there is one, else the CPU.
        config: The same flags as `HPUInferenceAccelerator`'s; by default all techniques are on.

    Raises:
        ValueError: If `config` has an option that needs a Trainer's dataloaders.

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
        self, model: nn.Module, device: torch.device | str | None = None, config: InferenceConfig | None = None
    ) -> None:
        self.config: InferenceConfig = config if config is not None else InferenceConfig()
        for name in ("bucket_lengths", "group_by_length", "trace"):
            if getattr(self.config, name) is not None:
                raise ValueError(f"`{name}` needs a Trainer, got {getattr(self.config, name)!r}. Leave it out here.")
        if self.config.pipelining == "auto":
            raise ValueError("`pipelining='auto'` needs a Trainer. Choose `prefetch` and `in_flight` here.")
        self.device: torch.device = torch.device(device or (_habana.DEVICE_TYPE if _habana.is_available() else "cpu"))
        self._on_hpu = self.device.type == _habana.DEVICE_TYPE
        kind = graph_kind(self.device, self.config)
        model = model.eval().to(self.device)
        self._attached = ExitStack()
        step: Callable[..., Any] = model
        if kind is not None:
            graphs = StepGraphs(model, self.device, self.config, kind)
            self._attached.callback(graphs.release)
            step = self._attached.enter_context(graphs.attached(model))
        self._step = DeviceStep(step, self.device)
        self._depth = self.config.in_flight_depth(self.device.type)
        self._async_outputs = AsyncOutputs() if self.config.pipelining and self.config.async_output else None
        self._pushed = InFlight(self._launch, self._depth)
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
        self._pushed.clear()
        self._attached.close()

    def push(self, batch: Any) -> None:
        """Launch a batch of host tensors, whose memory may be filled again afterwards. Does not wait for the device.

        Raises:
            RuntimeError: If the pipeline is closed.
        """
        self._pushed.launch(self._prepare(batch, reused=self._on_hpu))

    def pop(self) -> Any:
        """Wait for the oldest batch pushed and return its output with host tensors.

        Raises:
            IndexError: If every batch pushed was popped.
        """
        return self._retire(self._pushed)

    def predict(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Outputs of `batches` in order, with host tensors. Later batches are prepared and launched meanwhile.

        Batches that were pushed by hand are not among them.

        Raises:
            RuntimeError: If the pipeline is closed.
        """
        in_flight = InFlight(self._launch, self._depth)
        ahead = self.config.prefetch_depth(self.device.type)
        # On the CPU a batch is done with when it is launched.
        reused = may_reuse_memory(batches) and (self._on_hpu or ahead > 0)
        prepare = partial(self._prepare, reused=reused)
        with Prefetcher(map(prepare, batches), ahead, torch.inference_mode) as prepared:
            for batch in prepared:
                in_flight.launch(batch)
                if in_flight.over_capacity:
                    yield self._retire(in_flight)
        while in_flight:
            yield self._retire(in_flight)

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

    def _retire(self, in_flight: InFlight[Any]) -> Any:
        with torch.inference_mode():
            return in_flight.retire()[1]
