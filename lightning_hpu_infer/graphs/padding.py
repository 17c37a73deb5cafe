"""Which dimensions of a traced graph follow the number of rows of a batch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor

from lightning_hpu_infer import _torch
from lightning_hpu_infer.shapes import pad_rows


@dataclass(frozen=True)
class BatchDimension:
    """The symbol that stands for the number of rows, and where it occurs.

    A *key* is what `CapturedGraph` keeps of the inputs: `(numbers, descriptions of tensors, values on the host)`.
    """

    inputs: tuple[int, ...]
    """The places, among the graph's inputs, of tensors whose first dimension it is."""
    described: tuple[int, ...]
    """The places of the same tensors in a key."""
    counts: tuple[int, ...]
    """The places, among the graph's inputs, of numbers that are its value."""
    numbers: tuple[int, ...]
    """The places of the same numbers in a key."""
    outputs: tuple[tuple[int, ...], ...]
    """Per result, the dimensions that it is."""

    @classmethod
    def of(
        cls, results: Sequence[Tensor], values: Sequence[Any], places: Sequence[int], numbers: Sequence[int]
    ) -> "BatchDimension | None":
        """Find it. None if there is none, or if anything but a size depends on it.

        Args:
            results: The fake tensors that the captured part returns.
            values: The fake values of the graph's inputs.
            places: Which of them are tensors that change from batch to batch.
            numbers: Which of them are numbers.
        """
        first = {sizes[0] for i in places if (sizes := _torch.sizes_of(values[i])) and type(sizes[0]) is str}
        candidates = (cls._with(str(symbol), results, values, places, numbers) for symbol in sorted(first, key=str))
        return next((found for found in candidates if found is not None), None)

    @classmethod
    def _with(
        cls,
        symbol: str,
        results: Sequence[Tensor],
        values: Sequence[Any],
        places: Sequence[int],
        numbers: Sequence[int],
    ) -> "BatchDimension | None":
        inputs = []
        for i in places:
            first, *others = _torch.sizes_of(values[i]) or [1]
            if any(_mentions(size, symbol) for size in others):
                return None
            if first == symbol:
                inputs.append(i)
        outputs = []
        for value in results:
            sizes = _torch.sizes_of(value)
            dims = tuple(dim for dim, size in enumerate(sizes) if size == symbol)
            if not dims or any(_mentions(size, symbol) and size != symbol for size in sizes):
                return None
            outputs.append(dims)
        described = tuple(list(places).index(i) for i in inputs)
        counted = tuple(place for place, i in enumerate(numbers) if _text(values[i]) == symbol)
        counts = tuple(numbers[place] for place in counted)
        return cls(tuple(inputs), described, counts, counted, tuple(outputs)) if inputs else None

    def rows_of(self, key: Any) -> int:
        """The number of rows of a shape."""
        return int(key[1][self.described[0]][0][0])

    def smallest(self, key: Any, keys: Iterable[Any]) -> Any:
        """Of some shapes, the smallest that a batch of another shape fits in; None if none is."""
        fitting = [(rows, other) for other in keys if (rows := self.larger_rows(other, key)) is not None]
        return min(fitting, key=itemgetter(0))[1] if fitting else None

    def larger_rows(self, large: Any, small: Any) -> int | None:
        """The number of rows of one shape, if another differs from it in having fewer, and in nothing else."""
        more, fewer = self.rows_of(large), self.rows_of(small)
        if not 0 < fewer < more or large[2] != small[2]:
            return None
        for place, (one, other) in enumerate(zip(large[0], small[0], strict=True)):
            if one != other and place not in self.numbers:
                return None
        for place, (one, other) in enumerate(zip(large[1], small[1], strict=True)):
            (shape, stride, dtype), (short, short_stride, short_dtype) = one, other
            rows = (more, fewer) if place in self.described else (0, 0)
            if (stride, dtype) != (short_stride, short_dtype) or shape[1:] != short[1:]:
                return None
            if (shape[:1], short[:1]) != ((rows[0],), (rows[1],)) and shape != short:
                return None
        return more

    def pad(self, args: Sequence[Any], rows: int) -> tuple[Any, ...]:
        """The inputs with so many rows: the last row is repeated."""
        padded = list(args)
        for place in self.inputs:
            padded[place] = pad_rows(padded[place], rows)
        for place in self.counts:
            padded[place] = rows
        return tuple(padded)

    def cut(self, results: Sequence[Tensor], rows: int) -> list[Tensor]:
        """The results of the first rows."""
        cut = []
        for result, dims in zip(results, self.outputs, strict=True):
            for dim in dims:
                result = result.narrow(dim, 0, rows)
            cut.append(result)
        return cut


def _text(value: Any) -> str:
    return str(value.node.expr) if hasattr(value, "node") else str(value)


def _mentions(size: str | int, symbol: str) -> bool:
    return type(size) is str and symbol in {word.strip("()") for word in _words(size)}


def _words(text: str) -> list[str]:
    for sign in "+-*/(),":
        text = text.replace(sign, " ")
    return text.split()
