"""Positions in a dataset as a few ranges, which is what a rank's share of one is."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_RANGES = 64

Ranges = list[list[int]]
"""Of `[start, stop, step]` each, as `range` takes them."""


def ranges_of(indices: NDArray[np.int64], most: int | None = MAX_RANGES) -> Ranges | None:
    """Indices as ranges of ascending numbers, each index as often as it is there; None if more than `most` are needed.

    Args:
        indices: In any order, which is not kept.
        most: How many ranges at most; None for any number.
    """
    values = np.sort(indices)
    steps = np.diff(values)
    # Where the distance to the next one is another than that to the one before.
    turns = np.flatnonzero(np.diff(steps)) + 1
    ranges: Ranges = []
    first = 0
    while first < len(values):
        if most is not None and len(ranges) == most:
            return None
        start, step = int(values[first]), int(steps[first]) if first < len(steps) else 0
        last = first
        if step:  # Equal numbers are ranges of one each.
            at = int(np.searchsorted(turns, first, side="right"))
            last = int(turns[at]) if at < len(turns) else len(values) - 1
        ranges.append([start, int(values[last]) + 1, step or 1])
        first = last + 1
    return ranges


def indices_of(ranges: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """The indices of ranges, sorted."""
    # `np.arange` of large numbers computes its length in floats.
    parts = [start + step * np.arange(len(range(start, stop, step)), dtype=np.int64) for start, stop, step in ranges]
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
