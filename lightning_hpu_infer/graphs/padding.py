"""Short batches in larger graphs: which sizes of a traced graph follow the number of rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hpu_infer import _torch
from lightning_hpu_infer.graphs.store import Key

Sizes = tuple[str | int, ...]


@dataclass(frozen=True)
class Fit:
    """How one shape fits into another."""

    large: Key
    """What is kept of the inputs of the larger one."""
    rows: int
    """Its rows."""
    fewer: int
    """The rows of the smaller one."""
    symbols: frozenset[str]
    """The symbolic sizes that differ: the numbers of rows of all inputs, which are not always known to be equal."""


class Padding:
    """Pads the inputs of a traced graph to more rows, and cuts its results.

    Args:
        results: The fake tensors that the graph returns.
        values: The fake values of its inputs.
        places: Which of them are tensors that change from batch to batch, as a key describes them.
        numbers: Which of them are numbers, as a key holds them.
    """

    def __init__(
        self, results: Sequence[Tensor], values: Sequence[Any], places: Sequence[int], numbers: Sequence[int]
    ) -> None:
        self._results: list[Sizes] = [tuple(_torch.sizes_of(result)) for result in results]
        self._places = list(places)
        self._inputs: list[Sizes] = [tuple(_torch.sizes_of(values[place])) for place in places]
        self._numbers = list(numbers)
        self._counts = [_torch.number_as_text(values[place]) for place in numbers]

    def fit(self, small: Key, keys: Iterable[Key]) -> Fit | None:
        """The smallest of some shapes that another one differs from in having fewer rows and nothing else."""
        fits = [found for large in keys if (found := self._fit(large, small)) is not None]
        return min(fits, key=lambda found: found.rows) if fits else None

    def _fit(self, large: Key, small: Key) -> Fit | None:
        changes, symbols = set[tuple[int, int]](), set[str]()
        if large[2] != small[2]:
            return None
        for sizes, one, other in zip(self._inputs, large[1], small[1], strict=True):
            if one == other:
                continue
            (shape, *layout), (short, *short_layout) = one, other
            if layout != short_layout or shape[1:] != short[1:] or type(sizes[0]) is not str:
                return None
            changes.add((shape[0], short[0]))
            symbols.add(sizes[0])
        if len(changes) != 1:
            return None
        ((rows, fewer),) = changes
        for symbol, one, other in zip(self._counts, large[0], small[0], strict=True):
            if one != other and not (symbol in symbols and (one, other) == (rows, fewer)):
                return None
        return Fit(large, rows, fewer, frozenset(symbols)) if 0 < fewer < rows else None

    def unfit(self, fit: Fit) -> str:
        """Why results cannot be cut, in words; empty if they can."""
        for sizes in self._results:
            if not any(size in fit.symbols for size in sizes):
                return f"a result of shape {[str(size) for size in sizes]} has no dimension of rows"
            if any(size not in fit.symbols and _torch.mentions(size, fit.symbols) for size in sizes):
                return f"a result of shape {[str(size) for size in sizes]} has a size that is computed from the rows"
        inner = (size for sizes in self._inputs for size in sizes[1:])
        if any(_torch.mentions(size, fit.symbols) for size in inner):
            return "an input has the number of rows in another dimension too"
        return ""

    def pad(self, args: Sequence[Any], fit: Fit) -> tuple[Any, ...]:
        """The inputs with the rows of the larger shape: the last row is repeated."""
        padded = list(args)
        for place, sizes in zip(self._places, self._inputs, strict=True):
            if sizes and sizes[0] in fit.symbols:
                padded[place] = pad_rows(padded[place], fit.rows)
        for place, symbol in zip(self._numbers, self._counts, strict=True):
            if symbol in fit.symbols:
                padded[place] = fit.rows
        return tuple(padded)

    def cut(self, results: Sequence[Tensor], fit: Fit) -> list[Tensor]:
        """The results of the smaller shape's rows."""
        cut = []
        for result, sizes in zip(results, self._results, strict=True):
            for dim, size in enumerate(sizes):
                if size in fit.symbols:
                    result = result.narrow(dim, 0, fit.fewer)
            cut.append(result)
        return cut


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Fill a tensor up to `rows` in dimension 0 with copies of its last row.

    Not with zeros: a row of zeros gives NaN where a network divides by its norm or by the sum of its mask.

    Raises:
        ValueError: If it has no row, or more than `rows`.
    """
    if not tensor.dim() or not 0 < len(tensor) <= rows:
        raise ValueError(f"A tensor of shape {tuple(tensor.shape)} cannot be filled up to {rows} rows.")
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])
