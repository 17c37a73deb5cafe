"""Pinned host memory: a block counts as pinned at exactly its first address (bridge: host_memory.cpp:114-131)."""

from __future__ import annotations

import math
import mmap
import weakref

import torch

_blocks: dict[int, object] = {}
"""Address -> a token of the live block that begins there."""


def empty(size: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Allocate a pinned tensor; its block is freed with the last tensor that shows it."""
    nbytes = math.prod(size) * dtype.itemsize
    # An anonymous mapping can be referred to weakly and lives exactly as long as the torch storage that holds it.
    block = mmap.mmap(-1, max(nbytes, 1))
    flat = torch.frombuffer(block, dtype=torch.uint8)
    address = flat.data_ptr()
    token = _blocks[address] = object()
    weakref.finalize(block, _forget, address, token).atexit = False
    return flat[:nbytes].view(dtype).view(size)


def _forget(address: int, token: object) -> None:
    # The memory is free before this runs, so another thread may have a new block at the same address by now.
    if _blocks.get(address) is token:
        del _blocks[address]


def is_pinned(tensor: torch.Tensor) -> bool:
    """Tell whether DMA can use the memory of `tensor` directly."""
    return bool(_blocks) and tensor.device.type == "cpu" and tensor.data_ptr() in _blocks


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Copy `tensor` to pinned memory, keeping a dense layout."""
    flat = empty(torch.Size([tensor.numel()]), tensor.dtype)
    layout = torch.empty_like(tensor, device="meta")
    return flat.as_strided(layout.shape, layout.stride()).copy_(tensor)


def num_blocks() -> int:
    """Return how many pinned blocks are alive."""
    return len(_blocks)
