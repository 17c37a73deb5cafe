"""Which dimensions of a traced graph follow the number of rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_hpu_infer import _torch
from lightning_hpu_infer.shapes import pad_rows


@dataclass(frozen=True)
class BatchDimension:
    """The symbol that stands for the number of rows, and where it occurs."""

    number: int
    """The place among the graph's inputs that holds its value."""
    inputs: tuple[int, ...]
    """The places of tensors whose first dimension it is."""
    outputs: tuple[tuple[int, ...], ...]
    """Per result, the dimensions that it is."""

    @classmethod
    def of(
        cls, results: Sequence[Tensor], values: Sequence[Any], places: Sequence[int]
    ) -> "BatchDimension | None":
        """Find it. None if there is none, or if anything but a size depends on it.

        Args:
            results: The fake tensors that the captured part returns.
            values: The fake values of the graph's inputs.
            places: Which of them are tensors that change from batch to batch.
        """
        first = {sizes[0] for i in places if (sizes := _torch.sizes_of(values[i])) and type(sizes[0]) is str}
        for symbol in sorted(first, key=str):
            found = cls._with(str(symbol), results, values, places)
            if found is not None:
                return found
        return None

    @classmethod
    def _with(
        cls, symbol: str, results: Sequence[Tensor], values: Sequence[Any], places: Sequence[int]
    ) -> "BatchDimension | None":
        numbers = [i for i, value in enumerate(values) if not isinstance(value, Tensor) and _text(value) == symbol]
        inputs = []
        for i in places:
            sizes = _torch.sizes_of(values[i])
            if any(_mentions(size, symbol) for size in sizes[1:]):
                return None
            if sizes and sizes[0] == symbol:
                inputs.append(i)
        outputs = []
        for value in results:
            sizes = _torch.sizes_of(value)
            dims = tuple(dim for dim, size in enumerate(sizes) if size == symbol)
            if not dims or any(_mentions(size, symbol) and size != symbol for size in sizes):
                return None
            outputs.append(dims)
        return cls(numbers[0], tuple(inputs), tuple(outputs)) if numbers else None

    def of_key(self, key: Any, numbers: Sequence[int]) -> int:
        """The number of rows that a shape has.

        Args:
            key: `(numbers, descriptions)` as `CapturedGraph` keeps them.
            numbers: The places of the numbers in the graph's inputs.
        """
        return int(key[0][numbers.index(self.number)])

    def rows_of(self, large: Any, small: Any, numbers: Sequence[int]) -> int | None:
        """The number of rows of one shape, if another differs from it in having fewer, and in nothing else."""
        place = numbers.index(self.number)
        more, fewer = large[0][place], small[0][place]
        if not 0 < fewer < more or any(
            one != other for i, (one, other) in enumerate(zip(large[0], small[0], strict=True)) if i != place
        ):
            return None
        if large[2] != small[2]:
            return None
        for (shape, stride, dtype), (short, short_stride, short_dtype) in zip(large[1], small[1], strict=True):
            if (stride, dtype, shape[1:]) != (short_stride, short_dtype, short[1:]):
                return None
        return int(more)

    def pad(self, args: Sequence[Any], rows: int) -> tuple[Any, ...]:
        """The inputs with so many rows: the last row is repeated."""
        padded = list(args)
        for place in self.inputs:
            padded[place] = pad_rows(padded[place], rows)
        padded[self.number] = rows
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
