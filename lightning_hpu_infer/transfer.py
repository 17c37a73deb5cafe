"""Copies between host and device, in both directions: inputs that nobody waits for, outputs that are complete."""

from collections import UserDict, deque
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_hpu_infer import _habana
from lightning_hpu_infer.nested import map_tensors, tensors_in
from lightning_hpu_infer.observer import Observer, Stage

_HOST = torch.device("cpu")


def to_host(data: Any) -> Any:
    """Move a collection to the host as Lightning does, but without its walk where there is one tensor only."""
    return data.cpu() if type(data) is Tensor else move_data_to_device(data, _HOST)


def clone(data: Any) -> Any:
    """A collection with copies of its tensors, for memory that its owner may write again. Any thread, any device."""
    return map_tensors(Tensor.clone, data)


# To the device


def pin(batch: Any) -> Any:
    """Copy the host tensors of a batch to pinned memory, from where the device reads them without the host's help.

    Every tensor gets a new buffer that nobody writes again. So there is no moment at which a buffer could be reused too
    early, and the bridge keeps a buffer alive until its copy is done (bridge 1.19 `tensor_utils.cpp`).

    Safe in any thread: it allocates host memory and touches no device tensor.

    Args:
        batch: Any collection of host tensors of any shape and dtype. Tensors that are pinned, sparse, or of a dtype
            that the bridge converts on the host, and objects with a `.to` method, stay as they are.
    """
    return map_tensors(_pin_tensor, batch, leaf=_moves_itself)


def _pin_tensor(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu" or tensor.is_sparse or not tensor.numel() or _habana.cast_on_host(tensor.dtype):
        return tensor
    return tensor.pin_memory(_habana.DEVICE_TYPE)


def _moves_itself(data: Any) -> bool:
    # A `BatchEncoding` has a `.to`, which moves the tensors that it holds.
    return hasattr(data, "to") and not isinstance(data, UserDict)


# To the host


class PinnedBuffers:
    """Pinned host memory for outputs, reused once an output was read: pinning is slow and such memory scarce.

    Main thread only.
    """

    def __init__(self) -> None:
        self._free: deque[Tensor] = deque(maxlen=64)

    def take(self, tensor: Tensor) -> Tensor:
        """A buffer for a copy of a device tensor, of its shape and dtype."""
        for index, free in enumerate(self._free):
            if free.shape == tensor.shape and free.dtype == tensor.dtype:
                del self._free[index]
                return free
        return torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory(_habana.DEVICE_TYPE)

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer that nothing writes to any more and that nobody reads."""
        self._free.append(buffer)


class PendingOutput:
    """What a step returned, while the device may still be computing it. Main thread only.

    The copy to the host is blocking and late by design: a blocking copy waits for its own producer only, so a later
    batch that was launched already keeps the device busy meanwhile, whereas a non-blocking copy to the host may be
    read too early (bridge 1.19 `device.cpp`, and Lightning's issue #11287: zeros in written predictions).

    With `buffers` a copy is enqueued at once instead, and runs beside later work of the device and of the host. As its
    destination is pinned, an event says when it may be read.

    Args:
        output: Any collection, tensors of it on any device. No graph may write them again.
        device: Where the step was launched.
        fetch: Whether anybody wants the output on the host.
        buffers: Where to copy to without waiting. What the bridge can only copy and wait is still copied late.
        observer: Observes the wait and the copy.
        batch: The batch's index, for the observer.
    """

    def __init__(
        self,
        output: Any,
        device: torch.device,
        *,
        fetch: bool = True,
        buffers: PinnedBuffers | None = None,
        observer: Observer | None = None,
        batch: int | None = None,
    ) -> None:
        tensors = list(tensors_in(output))
        on_hpu = device.type == _habana.DEVICE_TYPE
        self._output = output
        self._versions: list[tuple[Tensor, int]] = []
        if not torch.is_inference_mode_enabled():
            self._versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
        elif not all(tensor.is_inference() for tensor in tensors):
            # Nothing that was computed just now: a buffer or a weight, which a later step may overwrite.
            self._output = map_tensors(_clone_unless_inference, output)
        self._fetch = on_hpu and fetch and any(tensor.device.type == device.type for tensor in tensors)
        self._buffers = buffers
        self._copies: dict[int, Tensor] = {}
        if self._fetch and buffers is not None:
            for tensor in tensors_in(self._output):
                if tensor.device.type == device.type and id(tensor) not in self._copies:
                    self._start_copy(tensor, buffers)
        self._observer = observer or Observer()
        self._batch = batch
        self._event = None
        if on_hpu and (self._observer.records or self._copies or not self._fetch):
            # Without a copy that waits, only an event bounds how far the host can run ahead of the device.
            self._event = _habana.record_event()

    def result(self) -> Any:
        """Wait until the output is complete and return it with host tensors; unmoved if `fetch` was False.

        Raises:
            RuntimeError: If a tensor was overwritten in place since it was returned.
        """
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError(
                "A tensor that `predict_step` returned was overwritten in place before it was fetched, so its values"
                " are lost. Return a `.clone()` of it, or pass `pipelining=False`."
            )
        self._observer.at(self._batch)
        if self._event is not None:
            self._observer.timed(Stage.WAIT_OUTPUT, self._event.synchronize)
        if not self._fetch:
            return self._output
        try:
            return self._observer.timed(Stage.COPY_OUT, self._move, self._output)
        except (ValueError, MisconfigurationException):
            # A frozen dataclass cannot be moved. Hooks get it as stock Lightning's do; storing it raises there too.
            return self._output

    def drop(self) -> None:
        """Give the output up, without freeing memory that the device still writes to."""
        if self._copies and self._event is not None:
            self._event.synchronize()
            self._copies.clear()

    def _start_copy(self, tensor: Tensor, buffers: PinnedBuffers) -> None:
        if tensor.is_sparse or not tensor.is_contiguous() or not tensor.numel() or _habana.cast_on_host(tensor.dtype):
            return
        buffer = buffers.take(tensor)
        # The output of a convolution that no graph has cloned is kept permuted (bridge 1.19 `permute_tensors.cpp`).
        with suppress(RuntimeError):
            self._copies[id(tensor)] = buffer.copy_(tensor, non_blocking=True)

    def _move(self, output: Any) -> Any:
        if self._copies and self._buffers is not None:
            output = map_tensors(self._copied, output)
            for buffer in self._copies.values():
                self._buffers.give_back(buffer)
            self._copies.clear()
        return move_data_to_device(output, _HOST)

    def _copied(self, tensor: Tensor) -> Tensor:
        # Whoever gets the output may keep it.
        return self._copies[id(tensor)].clone() if id(tensor) in self._copies else tensor


def _clone_unless_inference(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_inference() else tensor.clone()
