"""Copies between host and device, in both directions: inputs that nobody waits for, outputs that are complete."""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hpu_infer import _habana
from lightning_hpu_infer.links import explained
from lightning_hpu_infer.nested import map_leaves, map_tensors, parts_of, tensors_in
from lightning_hpu_infer.observer import Observer, Stage
from lightning_hpu_infer.ownership import copy_of, moves_itself, owned

_HOST = torch.device("cpu")
# Sequences that need not, or cannot, be built anew.
_KEPT = (list, tuple, str, bytes, range, memoryview, array)


def to_host(data: Any) -> Any:
    """Move a collection to the host as Lightning does, in new containers, but of whatever kind they are.

    Lightning builds each anew by its constructor, which not every class can do (2.6 `apply_func.py`).
    """
    return data.cpu() if type(data) is Tensor else map_leaves(_leaf_to_host, data, leaf=_is_leaf, copies=True)


def _to_host_if_it_can(data: Any) -> Any:
    """The same, before stock Lightning would: objects whose `to` takes no device stay as they are."""
    return data.cpu() if type(data) is Tensor else map_leaves(_leaf_to_host_if_it_can, data, leaf=_is_leaf, copies=True)


def host_copy(data: Any) -> Any:
    """A copy on the host that nobody else has. Waits for the device. Main thread only."""

    def copied(tensor: Tensor) -> Tensor:
        return copy_of(tensor) if tensor.device.type == "cpu" else tensor.cpu()

    return _to_host_if_it_can(owned(data, copied, Tensor.clone))  # objects that move themselves are moved last


def fetch(
    data: Any, device: torch.device, observer: Observer, batch: int | None, move: Callable[[Any], Any] = to_host
) -> Any:
    """Move what a step on `device` returned to the host, and tell waiting from copying."""
    observer.at(batch)
    if device.type == _habana.DEVICE_TYPE:
        observer.timed(Stage.WAIT_OUTPUT, _habana.record_event().synchronize)
    return observer.timed(Stage.COPY_OUT, move, data)


def _is_leaf(data: object) -> bool:
    """Whether this is left to Lightning: objects that move themselves, and sequences, which it builds anew."""
    return moves_itself(data) or (isinstance(data, Sequence) and not isinstance(data, _KEPT) and parts_of(data) is None)


def _leaf_to_host(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else move_data_to_device(leaf, _HOST)


def _leaf_to_host_if_it_can(leaf: Any) -> Any:
    try:
        return _leaf_to_host(leaf)
    except (TypeError, ValueError, AttributeError):
        if not moves_itself(leaf):
            raise
        return leaf


# To the device


def pin(batch: Any, *, owns: bool = False) -> Any:
    """Copy the host tensors of a batch to pinned memory, from where the device reads them without the host's help.

    Every tensor gets a new buffer that nobody writes again. So there is no moment at which a buffer could be reused too
    early, and the bridge keeps a buffer alive until its copy is done (bridge 1.19 `tensor_utils.cpp`).

    Safe in any thread: it allocates host memory and touches no device tensor.

    Args:
        batch: Any collection of host tensors of any shape and dtype. Tensors that are pinned or not plain (sparse,
            nested, quantized, of a class of the user's), or of a dtype that the bridge converts on the host, and
            objects with a `.to` method, stay as they are.
        owns: Whether all other memory in the batch is copied too, as `owned` does.
    """
    return owned(batch, _pinned_copy) if owns else map_tensors(_pin_tensor, batch, leaf=moves_itself)


def _pin_tensor(tensor: Tensor) -> Tensor:
    if (
        type(tensor) is not Tensor
        or tensor.device.type != "cpu"
        or tensor.layout is not torch.strided
        or tensor.is_nested
        or tensor.is_quantized
        or not tensor.numel()
        or _habana.cast_on_host(tensor.dtype)
    ):
        return tensor
    return tensor.pin_memory(_habana.DEVICE_TYPE)


def _pinned_copy(tensor: Tensor) -> Tensor:
    pinned = _pin_tensor(tensor)
    # Of one that is pinned already, it gives that one itself.
    return pinned if pinned is not tensor else _pin_tensor(copy_of(tensor))


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


class AsyncOutputs:
    """Copies of outputs to pinned memory that nobody waits for, of one run. Main thread only.

    In lazy mode the bridge may keep an output of rank 2 or more in another order of dimensions than it shows. A copy
    that is waited for puts it in order. One that is not brings the bytes as they lie; the error that says so surfaces
    in a later call, or not at all if another copy follows (bridge 1.19 `hpu_habana_launch_op_pt.cpp`,
    `permute_tensors.cpp`, `lazy_kernels.cpp`). Outputs of rank 1 are never kept so: what is copied without waiting is
    a flat clone. The first copies of each kind are compared with a copy that is waited for.
    """

    VERIFIED = 2
    """Copies per dtype and rank that are compared."""

    def __init__(self) -> None:
        self.usable = True
        """Whether copies arrived as they should so far."""
        self._buffers = PinnedBuffers()
        self._verified: Counter[tuple[torch.dtype, int]] = Counter()

    def can_copy(self, output: Any) -> bool:
        """Whether an output can be copied without waiting: all tensors of it, or none.

        Copies to the host run one after the other. One that is waited for, when its batch is the oldest, would run
        behind those that later batches have enqueued already, and so wait for their programs.
        """
        return self.usable and all(map(self._can_copy, filter(_is_copied, tensors_in(output))))

    def _can_copy(self, tensor: Tensor) -> bool:
        # Where the bridge converts on the host, it waits.
        return tensor.layout is torch.strided and not _habana.cast_on_host(tensor.dtype)

    def snapshot(self, tensor: Tensor) -> Tensor:
        """A copy on the device that can be copied to the host without waiting."""
        return tensor.flatten().clone()

    def start(self, snapshot: Tensor) -> Tensor:
        """Enqueue the copy of a snapshot; returns the buffer, which is filled once a later event is done."""
        buffer = self._buffers.take(snapshot)
        buffer.copy_(snapshot, non_blocking=True)
        return buffer

    def take(self, buffer: Tensor, snapshot: Tensor, like: Tensor) -> Tensor:
        """The copy in a buffer that is filled, in memory of its own, of the shape and strides of `like`."""
        kind = (snapshot.dtype, like.dim())
        if self.usable and self._verified[kind] < self.VERIFIED:
            self._verified[kind] += 1
            if not _equal_bytes(buffer, snapshot.cpu()):
                self.give_up(f"an output of {snapshot.dtype} and shape {tuple(like.shape)} arrived with other values")
        # Whoever gets the output may keep it.
        value = torch.empty_like(like, device=_HOST)
        value.copy_((buffer if self.usable else snapshot.cpu()).view(like.shape))
        self._buffers.give_back(buffer)
        return value

    def give_up(self, reason: str) -> None:
        """Copy no more without waiting, and say so."""
        self.usable = False
        rank_zero_warn(
            f"Copying outputs to the host without waiting went wrong ({reason}), so the rest of this run waits for each"
            " copy. No prediction is affected. Pass `async_output=False`, and please report it with what `python -m"
            " lightning_hpu_infer verify` writes." + explained("outputs-copied-without-waiting")
        )


def _is_copied(tensor: Tensor) -> bool:
    """Whether the device has anything to copy."""
    return tensor.device.type == _habana.DEVICE_TYPE and tensor.numel() > 0


def _equal_bytes(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


@dataclass(slots=True, eq=False)
class _Copy:
    """The copy of one tensor of an output, under way."""

    snapshot: Tensor
    like: Tensor
    """On the meta device: its shape, and the strides that its copy on the host has."""
    buffer: Tensor
    value: Tensor | None = None
    """What arrived, in memory of its own."""


class PendingOutput:
    """What a step returned, while the device may still be computing it. Main thread only.

    All memory of it is copied when this is made, of tensors on their device, since the step may return memory, a
    container or an object that a later step fills again.

    The copy to the host is blocking and late by design: a blocking copy waits for its own producer only, so a later
    batch that was launched already keeps the device busy meanwhile, whereas a non-blocking copy to the host may be
    read too early (bridge 1.19 `device.cpp`, and Lightning's issue #11287: zeros in written predictions).

    With `asynchronous` a copy is enqueued at once instead, and runs beside later work of the device and of the host. As
    its destination is pinned, an event says when it may be read.

    Args:
        output: Any collection, tensors of it on any device.
        device: Where the step was launched.
        fetch: Whether anybody wants the output on the host.
        asynchronous: Copies that need no wait. An output that the bridge can copy only in part so is copied late.
        observer: Observes the wait and the copy.
        batch: The batch's index, for the observer.
    """

    def __init__(
        self,
        output: Any,
        device: torch.device,
        *,
        fetch: bool = True,
        asynchronous: AsyncOutputs | None = None,
        observer: Observer | None = None,
        batch: int | None = None,
    ) -> None:
        self._on_hpu = device.type == _habana.DEVICE_TYPE
        self._fetch = fetch
        self._asynchronous = asynchronous
        self._copies: dict[int, _Copy] = {}
        self._observer = observer or Observer()
        self._batch = batch
        self._event: Any = None
        self._output: Any = None
        try:
            self._start(output)
        except RuntimeError as error:
            self.drop()
            if asynchronous is None or not asynchronous.usable or "non_blocking" not in str(error):
                raise
            asynchronous.give_up(str(error).splitlines()[0])
            self._start(output)

    def result(self) -> Any:
        """Wait until the output is complete and return it with host tensors; unmoved if `fetch` was False."""
        self._observer.at(self._batch)
        if self._event is not None:
            self._observer.timed(Stage.WAIT_OUTPUT, self._event.synchronize)
        if not self._fetch:
            return self._output
        return self._observer.timed(Stage.COPY_OUT, self._move, self._output)

    def drop(self) -> None:
        """Give the output up, without freeing memory that the device still writes to."""
        if self._copies:
            with suppress(RuntimeError):  # of work whose result nobody wants
                _habana.synchronize() if self._event is None else self._event.synchronize()
            self._copies.clear()

    def _start(self, output: Any) -> None:
        self._output = self._snapshots(output) if self._fetch else output
        if self._on_hpu and (self._observer.records or self._copies or not self._fetch):
            # Without a copy that waits, only an event bounds how far the host can run ahead of the device.
            self._event = _habana.record_event()

    def _snapshots(self, output: Any) -> Any:
        """The output in new containers, with copies of its tensors, whose copies to the host are enqueued."""
        flat: list[tuple[Tensor, Tensor]] = []
        asynchronous = self._asynchronous
        if asynchronous is not None and not asynchronous.can_copy(output):
            asynchronous = None

        def snapshot(tensor: Tensor) -> Tensor:
            if asynchronous is None or not _is_copied(tensor):
                return tensor.clone()
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            flat.append((asynchronous.snapshot(tensor), like))
            return flat[-1][0]

        output = owned(output, snapshot, Tensor.clone)
        if self._on_hpu:
            # Not with the next step: its end would be waited for.
            _habana.mark_step()
        if asynchronous is not None:
            for copy, like in flat:
                self._copies[id(copy)] = _Copy(copy, like, asynchronous.start(copy))
        return output

    def _move(self, output: Any) -> Any:
        output = _to_host_if_it_can(map_tensors(self._copied, output))
        self._copies.clear()
        return output

    def _copied(self, tensor: Tensor) -> Tensor:
        copy = self._copies.get(id(tensor))
        if copy is None or self._asynchronous is None:
            return tensor
        if copy.value is not None:  # the output has it twice
            return copy.value.clone()
        copy.value = self._asynchronous.take(copy.buffer, copy.snapshot, copy.like)
        return copy.value
