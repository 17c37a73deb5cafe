"""Batches in order of length within a window, and their results in the order of the batches."""

from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_hpu_infer.lengths.window import InOrder, longest_first
from tests.helpers import Broken


@given(st.lists(st.integers(0, 9)), st.integers(1, 6))
def test_each_window_is_longest_first_and_results_come_back_in_order(lengths: list[int], window: int) -> None:
    found = list(longest_first(lengths, window, lambda length: length))
    for start in range(0, len(found), window):
        part = found[start : start + window]
        assert sorted(place for place, _ in part) == list(range(start, start + len(part)))
        if window > 1:
            assert [length for _, length in part] == sorted(lengths[start : start + window], reverse=True)
    order = InOrder()
    results = [result for place, length in found for result in order.add(place, partial(int, length))]
    assert results == lengths


def test_no_more_than_a_window_is_asked_for() -> None:
    asked: list[int] = []

    def batches() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    found = longest_first(batches(), 4, lambda number: number)
    assert next(found) == (3, 3)
    assert asked == [0, 1, 2, 3]


@pytest.mark.parametrize("window", [1, 2, 3, 10])
def test_an_error_comes_after_the_batches_before_it(window: int) -> None:
    def batches() -> Iterator[int]:
        yield from range(5)
        raise Broken

    found: list[tuple[int, int]] = []
    with pytest.raises(Broken):
        found.extend(longest_first(batches(), window, lambda number: number))
    assert sorted(found) == [(number, number) for number in range(5)]


@pytest.mark.parametrize("window", [2, 3, 4, 10])
def test_an_error_of_a_length_comes_after_the_batches_before_it(window: int) -> None:
    def length_of(number: int) -> int:
        if number == 3:
            raise Broken
        return number

    found: list[tuple[int, int]] = []
    with pytest.raises(Broken):
        found.extend(longest_first(range(9), window, length_of))
    assert sorted(found) == [(number, number) for number in range(3)]


def test_a_result_is_taken_when_its_turn_comes() -> None:
    def broken() -> None:
        raise Broken

    order = InOrder()
    assert list(order.add(1, broken)) == []
    results = order.add(0, lambda: "first")
    assert next(results) == "first"
    with pytest.raises(Broken):
        next(results)
