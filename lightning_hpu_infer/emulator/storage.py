"""Device memory: layouts, storages and the cells that point to them."""

from __future__ import annotations

import itertools
import threading
import weakref

import torch

from lightning_hpu_infer.emulator.task import Task

_WIDE = frozenset({torch.int64, torch.float64})
_specs: dict[tuple[object, ...], Spec] = {}


class Spec:
    """Where a tensor lies in its storage: dtype, size, stride, offset. Interned, so identity is equality."""

    __slots__ = ("dtype", "numel", "offset", "size", "stride")

    def __init__(self, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], offset: int) -> None:
        self.dtype, self.size, self.stride, self.offset = dtype, size, stride, offset
        self.numel = 1
        for length in size:
            self.numel *= length

    @staticmethod
    def get(dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Spec:
        """Return the one Spec with these values."""
        key = (dtype, size, stride, offset)
        spec = _specs.get(key)
        if spec is None:
            spec = _specs.setdefault(key, Spec(dtype, size, stride, offset))
        return spec

    @staticmethod
    def of(tensor: torch.Tensor) -> Spec:
        """Return the layout of `tensor`."""
        return Spec.get(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    @staticmethod
    def fresh(tensor: torch.Tensor) -> Spec:
        """Return the layout a new tensor like `tensor` has: the same strides, no offset."""
        return Spec.get(tensor.dtype, tuple(tensor.shape), tensor.stride())

    def view(self, base: torch.Tensor) -> torch.Tensor:
        """Look at `base` (a tensor at offset 0 of its memory) through this layout."""
        if base.dtype is self.dtype:
            return base.as_strided(self.size, self.stride, self.offset)
        return base.new_empty(0, dtype=self.dtype).set_(base.untyped_storage(), self.offset, self.size, self.stride)

    def empty(self, device: str = "cpu") -> torch.Tensor:
        """Allocate memory of this layout."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device)


def poison(tensor: torch.Tensor, *, loud: bool) -> torch.Tensor:
    """Fill memory whose contents are not defined: NaN for floats.

    `loud` integers become their largest value; otherwise 0, so that indices read by mistake stay in range.
    """
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype is torch.bool:
        return tensor.fill_(loud)
    return tensor.fill_(torch.iinfo(tensor.dtype).max if loud else 0)


class Memory:
    """Counts device bytes under the names that `memory_stats` reports."""

    def __init__(self, *, lazy: bool) -> None:
        self.lazy = lazy
        # Reentrant: a collection may release storages while this thread accounts for one.
        self._lock = threading.RLock()
        self.in_use = self.peak = self.allocs = self.frees = self.largest = 0
        self._addresses = itertools.count(0x1000_0000_0000, 0x1_0000_0000)

    def allocate(self, spec: Spec) -> int:
        """Account for a storage and return its size."""
        # In lazy mode 64-bit types live on the device as 32-bit ones (bridge: lazy_kernels.cpp:310-344).
        width = 4 if self.lazy and spec.dtype in _WIDE else spec.dtype.itemsize
        nbytes = spec.numel * width
        with self._lock:
            self.in_use += nbytes
            self.allocs += 1
            self.peak = max(self.peak, self.in_use)
            self.largest = max(self.largest, nbytes)
        return nbytes

    def release(self, nbytes: int) -> None:
        """Give back what `allocate` accounted for."""
        with self._lock:
            self.in_use -= nbytes
            self.frees += 1

    def next_address(self) -> int:
        """Return a device address that no other storage has."""
        return next(self._addresses)


class Storage:
    """Device memory, seen as a future: `value` is filled by the device thread that runs `writer`.

    Tasks on other queues order themselves by `writer` and `readers` (the last reading task of each queue, by its name).
    """

    __slots__ = (
        "_memory",
        "address",
        "cell_ref",
        "error",
        "nbytes",
        "permuted",
        "readers",
        "spec",
        "value",
        "virgin",
        "writer",
    )

    def __init__(self, memory: Memory, spec: Spec, *, virgin: bool = False) -> None:
        self.spec = spec
        self.value: torch.Tensor | None = None
        self.error: BaseException | None = None
        self.writer: Task | None = None
        self.readers: dict[str, Task] = {}
        self.cell_ref: weakref.ref[Cell] | None = None
        self.virgin = virgin
        """Allocated and not written yet: its first use in a program allocates it there."""
        self.permuted = False
        self.address = 0
        self._memory = memory
        self.nbytes = memory.allocate(spec)

    def __del__(self) -> None:
        self._memory.release(self.nbytes)

    def read(self) -> torch.Tensor:
        """Return the contents; for device threads."""
        if self.error is not None:
            raise self.error
        if self.value is None:
            self.value = poison(self.spec.empty(), loud=False)
        return self.value

    def has_live_cell(self) -> bool:
        """Tell whether a tensor still points here."""
        return self.cell_ref is not None and self.cell_ref() is not None

    def data_ptr(self) -> int:
        """Return the emulated device address."""
        if not self.address:
            self.address = self._memory.next_address()
        return self.address


class Cell:
    """What the bridge calls a lazy tensor: a replay points it to a new storage.

    A tensor, its ``detach()`` and its views share one cell, so they all show the newest replay (bridge:
    hpu_lazy_tensors.cpp:1567-1646).
    """

    __slots__ = ("__weakref__", "_storage", "spec")

    def __init__(self, storage: Storage) -> None:
        self.spec = storage.spec
        self.storage = storage

    @property
    def storage(self) -> Storage:
        """The memory this cell points to now."""
        return self._storage

    @storage.setter
    def storage(self, storage: Storage) -> None:
        self._storage = storage
        storage.cell_ref = weakref.ref(self)
