"""Which lengths to pad to: no other choice pads less, and no choice takes long."""

import math
import random
import sys
from collections.abc import Sequence
from itertools import combinations
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hpu_infer.lengths.optimal import best_buckets, bucket_of, padding_waste

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=14)
COUNTS = st.integers(1, 6)
MULTIPLES = st.sampled_from([1, 2, 7, 8])


def cost(lengths: Sequence[int], buckets: Sequence[int]) -> int:
    return padding_waste(lengths, buckets)[0]


def aligned(length: float, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


def percentiles(lengths: Sequence[int], count: int, multiple: int) -> list[int]:
    """Habana's "best simple" buckets: as many samples in each."""
    ordered = sorted(lengths)
    ends = [ordered[math.ceil(len(ordered) * k / count) - 1] for k in range(1, count + 1)]
    return sorted({aligned(end, multiple) for end in ends})


def ladder(lengths: Sequence[int], count: int, multiple: int) -> list[int]:
    """Ends that grow by a constant factor."""
    low, high = min(lengths), max(lengths)
    return sorted(
        {aligned(low * (high / low) ** (k / count), multiple) for k in range(1, count)} | {aligned(high, multiple)}
    )


@given(LENGTHS, COUNTS, MULTIPLES)
def test_no_other_buckets_pad_less(lengths: list[int], count: int, multiple: int) -> None:
    buckets = best_buckets(lengths, count, multiple)
    *ends, top = sorted({aligned(length, multiple) for length in lengths})
    others = [[*chosen, top] for k in range(min(count, len(ends) + 1)) for chosen in combinations(ends, k)]
    assert cost(lengths, buckets) == min(cost(lengths, other) for other in others)


@given(LENGTHS, COUNTS, MULTIPLES)
def test_buckets_are_few_ascending_aligned_and_hold_everything(lengths: list[int], count: int, multiple: int) -> None:
    buckets = best_buckets(iter(lengths), count, multiple)
    assert len(buckets) <= count
    assert buckets == sorted(set(buckets))
    assert all(bucket % multiple == 0 for bucket in buckets)
    assert buckets[-1] == aligned(max(lengths), multiple)


@given(LENGTHS, COUNTS, MULTIPLES)
def test_more_buckets_never_pad_more(lengths: list[int], count: int, multiple: int) -> None:
    fewer, more = (best_buckets(lengths, k, multiple) for k in (count, count + 1))
    assert cost(lengths, more) <= cost(lengths, fewer)


@given(LENGTHS, COUNTS, MULTIPLES)
def test_usual_heuristics_are_never_better(lengths: list[int], count: int, multiple: int) -> None:
    best = cost(lengths, best_buckets(lengths, count, multiple))
    for heuristic in (percentiles, ladder):
        other = heuristic(lengths, count, multiple)
        assert len(other) <= count
        assert best <= cost(lengths, other)


@given(LENGTHS, COUNTS, st.randoms(use_true_random=False))
def test_the_order_of_lengths_does_not_matter(lengths: list[int], count: int, rng: random.Random) -> None:
    shuffled = rng.sample(lengths, len(lengths))
    assert best_buckets(shuffled, count) == best_buckets(lengths, count)


def test_enough_buckets_pad_nothing_but_the_alignment() -> None:
    assert best_buckets([3, 9, 9, 4], 10) == [3, 4, 9]
    assert best_buckets([3, 9, 9, 4], 10, multiple=8) == [8, 16]
    assert best_buckets([3, 9, 9, 4], 1) == [9]


def test_twice_as_many_distinct_lengths_take_twice_as_long() -> None:
    """Counted in lines of Python. All pairs of lengths would be four times as many."""

    def lines(distinct: int) -> int:
        executed = 0

        def count(frame: FrameType, event: str, _: object) -> Any:
            nonlocal executed
            executed += event == "line"
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            best_buckets(range(1, distinct + 1), 8)
        finally:
            sys.settrace(before)
        return executed

    assert lines(500) < 2.5 * lines(250)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4), "at least one, got none"),
        (([3, 0], 4), "must be positive, and at least one, got 0"),
        (([-1], 4), "got -1"),
        (([3], 0), "`count` and `multiple` must be positive, got 0 and 1"),
        (([3], 4, 0), "got 4 and 0"),
    ],
)
def test_nonsense_has_no_buckets(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_buckets(*arguments)


def test_a_length_goes_into_the_smallest_bucket_that_holds_it() -> None:
    assert [bucket_of(length, [4, 8]) for length in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, None]
    assert bucket_of(1, []) is None


def test_waste_counts_lengths_above_the_largest_bucket_as_they_are() -> None:
    assert padding_waste([1, 4, 9], [4, 8]) == (4 + 4 + 9, 14)
