"""Outputs on their way back to the host."""

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_hpu_infer import _habana
from lightning_hpu_infer.observe.spans import LaneTrace, Stage, untimed

_HOST = torch.device("cpu")


class PinnedBuffers:
    """Pinned host memory for outputs, used again once an output was read: pinning is slow and such memory scarce."""

    def __init__(self) -> None:
        self._free: deque[Tensor] = deque(maxlen=64)

    def take(self, tensor: Tensor) -> Tensor:
        """A buffer for a copy of a device tensor."""
        for place, free in enumerate(self._free):
            if free.shape == tensor.shape and free.dtype == tensor.dtype:
                del self._free[place]
                return free
        return torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory(_habana.DEVICE_TYPE)

    def give_back(self, buffer: Tensor) -> None:
        """Nothing writes to the buffer any more, and nobody reads it."""
        self._free.append(buffer)


class PendingOutput:
    """What a step returned, while the device may still be computing it.

    The copy to the host is blocking and late by design: a blocking copy waits for its own producer only, so a later
    batch that was launched already keeps the device busy meanwhile, whereas a non-blocking copy to the host may be
    read too early (bridge `device.cpp`, and Lightning's issue #11287: zeros in written predictions).

    With `buffers` a copy is enqueued at once instead, and runs beside later work of the device and of the host. As its
    destination is pinned, an event says when it may be read.

    Args:
        output: Any collection, tensors of it on any device. No graph may own them.
        device: Where the step was launched.
        fetch: Whether anybody wants the output on the host.
        buffers: Where to copy to without waiting. What the bridge can only copy and wait is still copied late.
        trace: Where waiting and copying are recorded, apart from one another.
    """

    def __init__(
        self,
        output: Any,
        device: torch.device,
        *,
        fetch: bool = True,
        buffers: PinnedBuffers | None = None,
        trace: LaneTrace | None = None,
    ) -> None:
        tensors = [output] if type(output) is Tensor else list(_tensors(output))
        on_hpu = device.type == _habana.DEVICE_TYPE
        self._output = output
        self._versions: list[tuple[Tensor, int]] = []
        if not torch.is_inference_mode_enabled():
            self._versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
        elif not all(tensor.is_inference() for tensor in tensors):
            # Nothing that was computed just now: a buffer or a weight, which a later step may overwrite.
            self._output = apply_to_collection(output, Tensor, _own)
        self._fetch = on_hpu and fetch and any(tensor.device.type == device.type for tensor in tensors)
        self._buffers = buffers
        self._copies: dict[int, Tensor] = {}
        if self._fetch and buffers is not None:
            for tensor in _tensors(self._output):
                if tensor.device.type == device.type and id(tensor) not in self._copies:
                    self._start_copy(tensor, buffers)
        self._event = None
        if on_hpu and (trace is not None or self._copies or not self._fetch):
            # Without a copy that waits, only an event bounds how far the host can run ahead of the device.
            self._event = _habana.record_event()
        self._trace = trace
        self._batch = trace.batch if trace is not None else None

    def result(self) -> Any:
        """Wait until the output is there and return it with host tensors; unmoved if `fetch` was False.

        Raises:
            RuntimeError: If a tensor was overwritten in place since it was returned.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                "A tensor that `predict_step` returned was overwritten in place before it was fetched, so its values"
                " are lost. Return a `.clone()` of it, or pass `pipelining=False`."
            )
        trace = self._trace
        if trace is not None:
            trace.batch = self._batch  # Later batches were launched since.
        call = untimed if trace is None else trace.timed
        if self._event is not None:
            call(Stage.WAIT_OUTPUT, self._event.synchronize)
        if not self._fetch:
            return self._output
        try:
            return call(Stage.COPY_OUT, self._move, self._output)
        except (ValueError, MisconfigurationException):
            # A frozen dataclass cannot be moved. Hooks get it as stock Lightning's do; storing it raises there too.
            return self._output

    def drop(self) -> None:
        """Give the output up, without letting go of memory that the device still writes to."""
        if self._copies and self._event is not None:
            self._event.synchronize()
            self._copies.clear()

    def _start_copy(self, tensor: Tensor, buffers: PinnedBuffers) -> None:
        if tensor.is_sparse or not tensor.is_contiguous() or not tensor.numel() or _habana.cast_on_host(tensor.dtype):
            return
        buffer = buffers.take(tensor)
        # The output of a convolution that no graph has cloned is kept permuted (bridge `permute_tensors.cpp`).
        with suppress(RuntimeError):
            self._copies[id(tensor)] = buffer.copy_(tensor, non_blocking=True)

    def _move(self, output: Any) -> Any:
        if self._copies and self._buffers is not None:
            output = apply_to_collection(output, Tensor, self._arrived)
            for buffer in self._copies.values():
                self._buffers.give_back(buffer)
            self._copies.clear()
        return move_data_to_device(output, _HOST)

    def _arrived(self, tensor: Tensor) -> Tensor:
        # Whoever gets the output may keep it.
        return self._copies[id(tensor)].clone() if id(tensor) in self._copies else tensor


def fetched(output: Any, device: torch.device, trace: LaneTrace) -> Any:
    """What `PendingOutput` makes of an output that is wanted at once, with spans of the wait and the copy."""
    return PendingOutput(output, device, trace=trace).result()


def _own(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_inference() else tensor.clone()


def _tensors(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors(list(vars(leaf).values()))
