"""Short batches in larger graphs: which sizes of a traced graph follow the number of rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hpu_infer import _torch
from lightning_hpu_infer.graphs.compare import difference
from lightning_hpu_infer.graphs.context import GraphContext
from lightning_hpu_infer.graphs.store import Key, PadState

Sizes = tuple[str | int, ...]


@dataclass(frozen=True)
class Fit:
    """How one shape fits into another."""

    large: Key
    """The key of the larger shape."""
    rows: int
    """Its rows."""
    fewer: int
    """The rows of the smaller one."""
    symbols: frozenset[str]
    """The symbolic sizes that differ: the numbers of rows of all inputs, which are not always known to be equal."""


class Padding:
    """Runs short batches in graphs of more rows. Main thread only.

    Args:
        context: What the graphs of a run share.
        results: The fake tensors that the graph returns.
        values: The fake values of its inputs.
        slots: Which of them are tensors that change from call to call, as in `Key.tensors`.
        numbers: Which of them are numbers, as in `Key.numbers`.
    """

    def __init__(
        self,
        context: GraphContext,
        results: Sequence[Tensor],
        values: Sequence[Any],
        slots: Sequence[int],
        numbers: Sequence[int],
    ) -> None:
        self._context = context
        self._results: list[Sizes] = [tuple(_torch.sizes_of(result)) for result in results]
        self._slots = list(slots)
        self._inputs: list[Sizes] = [tuple(_torch.sizes_of(values[slot])) for slot in slots]
        self._numbers = list(numbers)
        self._counts = [_torch.number_as_text(values[slot]) for slot in numbers]

    def fit(self, state: PadState, small: Key, keys: Iterable[Key]) -> Fit | None:
        """How a shape fits into the smallest of others that has more rows and no other difference; None if into none.

        Warns once in a run if results could not be cut.
        """
        if not state.allowed:
            return None
        fits = [found for large in keys if (found := self._fit(large, small)) is not None]
        fit = min(fits, key=lambda found: found.rows, default=None)
        if fit is not None and (reason := self._unfit(fit)):
            self._refuse(state, reason)
            return None
        return fit

    def run(
        self,
        state: PadState,
        fit: Fit,
        args: Sequence[Any],
        graph: Callable[[tuple[Any, ...]], Sequence[Tensor]],
        plain: Callable[..., Any],
    ) -> Sequence[Tensor]:
        """The results of a short batch, run in a larger graph and the first time compared with the plain ops.

        Args:
            state: What is known of the batch's shape.
            fit: How it fits into the graph's.
            args: The inputs.
            graph: Runs the larger graph on inputs of its shape; its results are the caller's.
            plain: Runs the plain ops.
        """
        results = self._cut(graph(self._pad(args, fit)), fit)
        self._context.counts.padded += 1
        if state.verified:
            return results
        state.verified = True
        expected: Sequence[Tensor] = plain(*args)
        self._context.counts.verified += 1
        if differs := difference(results, expected):
            self._refuse(state, f"rows added to a short batch change the others: {differs}")
        return expected

    def _refuse(self, state: PadState, reason: str) -> None:
        state.allowed = False
        self._context.warn(
            "padding",
            f"`pad_batch` is not used for {self._context.name}: {reason}. Short batches get graphs of their own, or run"
            " plainly.",
        )

    def _fit(self, large: Key, small: Key) -> Fit | None:
        changes, symbols = set[tuple[int, int]](), set[str]()
        if large.host_values != small.host_values:
            return None
        for sizes, one, other in zip(self._inputs, large.tensors, small.tensors, strict=True):
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
        for symbol, one, other in zip(self._counts, large.numbers, small.numbers, strict=True):
            if one != other and not (symbol in symbols and (one, other) == (rows, fewer)):
                return None
        return Fit(large, rows, fewer, frozenset(symbols)) if 0 < fewer < rows else None

    def _unfit(self, fit: Fit) -> str:
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

    def _pad(self, args: Sequence[Any], fit: Fit) -> tuple[Any, ...]:
        """The inputs with the rows of the larger shape: the last row is repeated."""
        padded = list(args)
        for slot, sizes in zip(self._slots, self._inputs, strict=True):
            if sizes and sizes[0] in fit.symbols:
                padded[slot] = pad_rows(padded[slot], fit.rows)
        for slot, symbol in zip(self._numbers, self._counts, strict=True):
            if symbol in fit.symbols:
                padded[slot] = fit.rows
        return tuple(padded)

    def _cut(self, results: Sequence[Tensor], fit: Fit) -> list[Tensor]:
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

    Args:
        tensor: Any dtype and device, at least one dimension.
        rows: Its rows afterwards.

    Returns:
        A new tensor on the same device, or `tensor` itself if it has that many rows.

    Raises:
        ValueError: If it has no row, or more than `rows`.
    """
    if not tensor.dim() or not 0 < len(tensor) <= rows:
        raise ValueError(f"A tensor of shape {tuple(tensor.shape)} cannot be filled up to {rows} rows.")
    if len(tensor) == rows:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])
