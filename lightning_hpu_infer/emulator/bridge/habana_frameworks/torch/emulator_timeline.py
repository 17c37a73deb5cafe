"""A timeline of what the emulated device did. The real bridge has no such module: its absence tells them apart."""

from typing import Any

from habana_frameworks.torch import _hpu_C


def start() -> None:
    """Record from now on; what was recorded before is dropped."""
    _hpu_C.start_timeline()


def stop() -> list[Any]:
    """Record no more and return the spans: ``queue``, ``kind``, ``start``, ``end`` and ``nbytes`` of each."""
    return _hpu_C.stop_timeline()
