"""Positions come back from ranges, whatever they were."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hpu_infer.writing.ranges import indices_of, ranges_of


@pytest.mark.parametrize(
    ("indices", "ranges"),
    [
        ([], []),
        ([5], [[5, 6, 1]]),
        ([0, 1, 2, 3], [[0, 4, 1]]),
        ([1, 5, 9, 13], [[1, 14, 4]]),
        ([3, 1, 2], [[1, 4, 1]]),
        ([0, 1, 2, 10, 11, 12], [[0, 3, 1], [10, 13, 1]]),
        ([4, 4, 4], [[4, 5, 1], [4, 5, 1], [4, 5, 1]]),
    ],
)
def test_ranges(indices: list[int], ranges: list[list[int]]) -> None:
    assert ranges_of(np.array(indices, np.int64)) == ranges


@given(st.lists(st.integers(0, 40) | st.integers(0, 2**62), max_size=80))
def test_there_and_back(indices: list[int]) -> None:
    ranges = ranges_of(np.array(indices, np.int64), most=None)
    assert ranges is not None
    assert len(ranges) <= len(indices)
    assert indices_of(ranges).tolist() == sorted(indices)
    assert [index for each in ranges for index in range(*each)] == sorted(indices)


def test_too_many_are_none() -> None:
    squares = np.arange(200, dtype=np.int64) ** 2
    assert ranges_of(squares) is None
    assert ranges_of(np.arange(10**6, dtype=np.int64) * 8 + 3) == [[3, 8 * 10**6 - 4, 8]]
