"""Batches in order of length within a window, and their results in the order in which the batches came."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import itemgetter
from typing import Any


def longest_first(batches: Iterable[Any], window: int, length_of: Callable[[Any], int]) -> Iterator[tuple[int, Any]]:
    """The batches, each with its place. Of every `window` batches the longest comes first.

    An error of `batches`, and one of `length_of`, comes after the batches before it.

    Args:
        batches: In the order in which they were made. One after the other is asked for, a window ahead.
        window: Batches that are looked at together; 1 leaves them in their order.
        length_of: Tells a batch's length.
    """
    numbered = enumerate(batches)
    if window == 1:
        yield from numbered
        return
    failed: BaseException | None = None
    while failed is None:
        found: list[tuple[int, int, Any]] = []
        try:
            for place, batch in islice(numbered, window):
                found.append((-length_of(batch), place, batch))
        except BaseException as error:  # what came before it is kept
            failed = error
        if not found:
            break
        # In the given order where lengths are equal.
        for _, place, batch in sorted(found, key=itemgetter(0)):
            yield place, batch
    if failed is not None:
        raise failed


class InOrder:
    """Gives results back by their places, whatever order they come in."""

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, Callable[[], Any]] = {}

    def add(self, place: int, result: Callable[[], Any]) -> Iterator[Any]:
        """Take a result; gives those whose turn it is.

        Args:
            place: Its place, from 0 on, each once.
            result: Returns it, or raises its error when its turn comes.
        """
        self._waiting[place] = result
        while self._next in self._waiting:
            self._next += 1
            yield self._waiting.pop(self._next - 1)()
