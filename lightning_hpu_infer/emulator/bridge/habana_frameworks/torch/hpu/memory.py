"""Device memory."""

from typing import Any

from habana_frameworks.torch import _hpu_C
from habana_frameworks.torch.hpu._utils import _get_device_index

__all__ = [
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "memory_summary",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
]


def _index(device: Any) -> int:
    index = _get_device_index(device, optional=True)
    if not 0 <= index < _hpu_C.device_count():
        raise AssertionError("Invalid device id")
    return index


def memory_stats(device: Any = None) -> dict[str, int]:
    """Return the allocator's counters."""
    return _hpu_C.get_mem_stats(_index(device))


def memory_allocated(device: Any = None) -> int:
    """Return the bytes in use."""
    return memory_stats(device)["InUse"]


def max_memory_allocated(device: Any = None) -> int:
    """Return the most bytes in use so far."""
    return memory_stats(device)["MaxInUse"]


def memory_reserved(device: Any = None) -> int:
    """Return all bytes of the device: the bridge's pool takes them at once (bridge: memory.py:153-162)."""
    return memory_stats(device)["Limit"]


max_memory_reserved = memory_reserved


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Return free and total bytes."""
    stats = memory_stats(device)
    return stats["Limit"] - stats["InUse"], stats["Limit"]


def memory_summary(device: Any = None) -> str:
    """Return the counters as text."""
    return _hpu_C.get_memory_summary(_index(device))


def reset_peak_memory_stats(device: Any = None) -> None:
    """Start a new peak."""
    _hpu_C.reset_peak_memory_stats(_index(device))


def reset_accumulated_memory_stats(device: Any = None) -> None:
    """Start a new peak, and count allocations anew."""
    _hpu_C.clear_memory_stats(_index(device))
