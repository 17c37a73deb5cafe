"""Device memory."""

from typing import Any

from habana_frameworks.torch import _hpu_C

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


def memory_stats(device: Any = None) -> dict[str, int]:
    """Return the allocator's counters."""
    return _hpu_C.memory_stats()


def memory_allocated(device: Any = None) -> int:
    """Return the bytes in use."""
    return memory_stats()["InUse"]


def max_memory_allocated(device: Any = None) -> int:
    """Return the most bytes in use so far."""
    return memory_stats()["MaxInUse"]


def memory_reserved(device: Any = None) -> int:
    """Return the bytes in use: the emulation has no pool."""
    return memory_stats()["InUse"]


def max_memory_reserved(device: Any = None) -> int:
    """Return the most bytes in use so far."""
    return memory_stats()["MaxInUse"]


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Return free and total bytes."""
    stats = memory_stats()
    return stats["Limit"] - stats["InUse"], stats["Limit"]


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """Return the counters as text."""
    return "\n".join(f"{name:20}{value}" for name, value in memory_stats().items())


def reset_peak_memory_stats(device: Any = None) -> None:
    """Start a new peak."""
    _hpu_C.reset_peak_memory()


def reset_accumulated_memory_stats(device: Any = None) -> None:
    """Start a new peak; allocation counters go on."""
    _hpu_C.reset_peak_memory()
