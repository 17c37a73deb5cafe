"""Shapes of host batches: which lengths to pad to, and the padding itself. Pure functions and frozen values."""

import copy
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor


def best_buckets(lengths: Iterable[int], count: int, multiple: int = 1) -> list[int]:
    """The bucket lengths that pad the given lengths least: exact, not a heuristic.

    What a bucket costs is its upper end times what it holds, so the best buckets end at lengths that occur. Their
    choice is a shortest path over the distinct lengths, in `O(count * distinct)`.

    For batches that are padded to their longest sample, give the lengths of batches, not of samples.

    Args:
        lengths: Lengths to be expected, each as often as it is expected. All positive.
        count: Buckets at most, and so graphs.
        multiple: Every bucket is a multiple of this.

    Returns:
        At most `count` ascending lengths, the last of which holds the longest of `lengths`.

    Raises:
        ValueError: If there are no lengths, or any number is not positive.
    """
    if count < 1 or multiple < 1:
        raise ValueError(f"`count` and `multiple` must be positive, got {count} and {multiple}.")
    seen = Counter(index(length) for length in lengths)
    if not seen or min(seen) < 1:
        raise ValueError(f"`lengths` must be positive, and at least one, got {min(seen) if seen else 'none'}.")
    aligned: Counter[int] = Counter()
    for length, times in seen.items():
        aligned[-(-length // multiple) * multiple] += times
    ends = sorted(aligned)
    holding = [0]  # what lies below each possible end
    for end in ends:
        holding.append(holding[-1] + aligned[end])
    costs = [0] + [end * held for end, held in zip(ends, holding[1:], strict=True)]
    steps: list[list[int]] = []
    for _ in range(1, min(count, len(ends))):
        costs, starts = _one_more(ends, holding, costs)
        steps.append(starts)
    buckets, stop = [], len(ends)
    while stop:
        buckets.append(ends[stop - 1])
        stop = steps.pop()[stop] if steps else 0
    return buckets[::-1]


def _one_more(ends: list[int], holding: list[int], costs: list[int]) -> tuple[list[int], list[int]]:
    """Costs of the first `stop` lengths with one more bucket, and where that bucket starts, for every `stop`.

    It is `min(costs[start] + ends[stop - 1] * (holding[stop] - holding[start]))` over `start < stop`: the lowest, at a
    growing `end`, of lines that fall ever more steeply. So a line that was passed never comes back.
    """
    lines: deque[int] = deque()
    best, starts = [0], [0]
    for stop, end in enumerate(ends, 1):
        new = stop - 1
        while len(lines) > 1 and _never_lowest(lines[-2], lines[-1], new, holding, costs):
            lines.pop()
        lines.append(new)
        while len(lines) > 1 and costs[lines[1]] - end * holding[lines[1]] <= costs[lines[0]] - end * holding[lines[0]]:
            lines.popleft()
        best.append(costs[lines[0]] + end * (holding[stop] - holding[lines[0]]))
        starts.append(lines[0])
    return best, starts


def _never_lowest(left: int, middle: int, right: int, slope: list[int], height: list[int]) -> bool:
    """Whether `right` passes below `left` before `middle` does."""
    return (height[right] - height[left]) * (slope[middle] - slope[left]) <= (height[middle] - height[left]) * (
        slope[right] - slope[left]
    )


def bucket_of(length: int, buckets: Sequence[int]) -> int | None:
    """The smallest of ascending `buckets` that holds `length`, or None if none does."""
    place = bisect_left(buckets, length)
    return buckets[place] if place < len(buckets) else None


def padding_waste(lengths: Iterable[int], buckets: Sequence[int]) -> tuple[int, int]:
    """Totals with and without padding. Lengths above the largest bucket stay as they are.

    Returns:
        `(padded, real)`: the sum of the buckets of the lengths, and the sum of the lengths.
    """
    padded = real = 0
    for length in lengths:
        padded += bucket_of(length, buckets) or length
        real += length
    return padded, real


@dataclass(frozen=True)
class Pad:
    """How one input is padded."""

    dim: int
    """The dimension that has the length; negative ones count from the last."""

    value: float | int | bool = 0
    """What it is filled up with."""


@dataclass(frozen=True, kw_only=True)
class PadSpec:
    """What has a variable length in a batch and in the output, so that it can be padded and cut again.

    Names are dotted paths, such as `input_ids` or `0.tokens.mask`: keys of mappings, fields of dataclasses and named
    tuples, indices of lists and tuples. The empty name is a batch or output that is itself a tensor.

    Raises:
        TypeError: If an input is not described by a `Pad`, or an output not by a dimension.
        ValueError: If there is no input, or `side` is neither right nor left.
    """

    inputs: Mapping[str, Pad]
    """The inputs to pad. The first defines a batch's length and is in every batch; the others may be absent or None."""

    outputs: Mapping[str, int] = field(default_factory=dict)
    """The dimensions in which outputs have the padded length and are cut back. Others stay as they are."""

    side: Literal["right", "left"] = "right"
    """Where padding is added, and outputs are cut."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("`inputs` of a `PadSpec` is empty: name at least the input that defines the length.")
        for name, pad in self.inputs.items():
            if not isinstance(pad, Pad):
                raise TypeError(f"Input {name!r} must be described by a `Pad`, such as `Pad(dim=1)`, got {pad!r}.")
        for name, dim in self.outputs.items():
            if type(dim) is not int:
                raise TypeError(f"Output {name!r} must be described by a dimension, such as `1`, got {dim!r}.")
        if self.side not in ("right", "left"):
            raise ValueError(f"`side` must be 'right' or 'left', got {self.side!r}.")

    @classmethod
    def tokenizer(cls, pad_token_id: int = 0, *, side: Literal["right", "left"] = "right", **outputs: int) -> "PadSpec":
        """The spec of batches that come from a tokenizer of Hugging Face: `(batch, length)` tensors.

        Args:
            pad_token_id: `tokenizer.pad_token_id`.
            side: `tokenizer.padding_side`.
            **outputs: Dimensions in which outputs have the padded length: `last_hidden_state=1`.
        """
        inputs = {"input_ids": Pad(1, pad_token_id), "attention_mask": Pad(1), "token_type_ids": Pad(1)}
        return cls(inputs=inputs, outputs=outputs, side=side)

    def length_of(self, batch: Any) -> int:
        """The length of a batch.

        Raises:
            ValueError: If the input that defines it is not there, or the inputs differ in length or have no such
                dimension.
        """
        lengths = {name: tensor.shape[pad.dim] for name, pad, tensor in self._inputs_of(batch)}
        if len(set(lengths.values())) != 1:
            found = ", ".join(f"{_shown(name)} {length}" for name, length in lengths.items())
            raise ValueError(
                f"The inputs that `PadSpec` names differ in length: {found}. Name only inputs that share one length,"
                " each with the dimension that has it."
            )
        return next(iter(lengths.values()))

    def lengths_in(self, batch: Any) -> list[tuple[Tensor, int]]:
        """The tensors of a batch that have the length, each with its dimension; empty for any other batch."""
        try:
            return [(tensor, pad.dim) for _, pad, tensor in self._inputs_of(batch)]
        except ValueError:
            return []

    def pad(self, batch: Any, length: int) -> Any:
        """The batch, padded to a length. The given one stays as it is; its tensors of that length are shared.

        Raises:
            ValueError: If the batch is longer than that.
        """
        if (longest := self.length_of(batch)) > length:
            raise ValueError(f"A batch of length {longest} cannot be padded to {length}.")
        for name, pad, tensor in self._inputs_of(batch):
            batch = _put(batch, _path(name), _padded(tensor, pad, length, self.side, name))
        return batch

    def narrow(self, batch: Any, length: int) -> Any:
        """The batch, cut to a length if it is longer. Its tensors are views of the given one's."""
        self.length_of(batch)
        for name, pad, tensor in self._inputs_of(batch):
            batch = _put(batch, _path(name), _narrowed(tensor, pad.dim, length, self.side))
        return batch

    def cut(self, output: Any, length: int, padded: int | None = None) -> Any:
        """The output, cut back to the length that its batch had before it was padded. On any device, without a copy.

        Args:
            output: What came of the padded batch.
            length: The length before padding.
            padded: The length after padding, if outputs are to be checked for it.

        Raises:
            ValueError: If a named output is not there, or has not the padded length in its dimension.
        """
        for name, dim in self.outputs.items():
            tensor = _get(output, _path(name))
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"The output has no tensor {_shown(name)}, which `PadSpec` names. It has {_names_in(output)}."
                )
            size = _size(tensor, dim, name)
            if size < length or padded not in (None, size):
                raise ValueError(
                    f"Output {_shown(name)} of shape {tuple(tensor.shape)} has not the padded length"
                    f" {padded or f'of at least {length}'} in dimension {dim}. Correct `outputs` of the `PadSpec`."
                )
            output = _put(output, _path(name), _narrowed(tensor, dim, length, self.side))
        return output

    def _inputs_of(self, batch: Any) -> Iterator[tuple[str, Pad, Tensor]]:
        for place, (name, pad) in enumerate(self.inputs.items()):
            tensor = _get(batch, _path(name))
            if isinstance(tensor, Tensor):
                _size(tensor, pad.dim, name)
                yield name, pad, tensor
            elif place == 0 or tensor is not None:
                found = "" if tensor is None else f" (it is of type {type(tensor).__name__})"
                raise ValueError(
                    f"The batch has no tensor {_shown(name)}{found}, which `PadSpec` names. It has {_names_in(batch)}."
                )


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


def parts_of(data: Any) -> dict[Any, Any] | None:
    """What a collection holds, by key, field or index. None for anything else."""
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return dict(zip(data._fields, data, strict=True))
    if isinstance(data, list | tuple):
        return dict(enumerate(data))
    if is_dataclass(data) and not isinstance(data, type):
        return {f.name: getattr(data, f.name) for f in fields(data)}
    return None


def with_parts(data: Any, parts: dict[Any, Any]) -> Any:
    """A collection of the same type that holds other parts under the same names."""
    if isinstance(data, tuple) and hasattr(data, "_make"):
        return data._make(parts.values())
    if isinstance(data, list | tuple):
        return type(data)(parts.values())
    if isinstance(data, Mapping) and not isinstance(data, MutableMapping):
        return type(data)(parts)  # type: ignore[call-arg]
    # A copy keeps what is no part: the encodings of a `BatchEncoding`, a default factory.
    data = copy.copy(data)
    for name, part in parts.items():
        if isinstance(data, MutableMapping):
            data[name] = part
        else:
            object.__setattr__(data, name, part)  # the dataclass may be frozen
    return data


def _path(name: str) -> list[str]:
    return name.split(".") if name else []


def _shown(name: str) -> str:
    return f"`{name}`" if name else "itself"


def _key(step: str, parts: dict[Any, Any]) -> Any:
    return int(step) if step not in parts and step.isdecimal() else step


def _get(data: Any, path: list[str]) -> Any:
    """What is at the end of a path; None if nothing is."""
    for step in path:
        if (parts := parts_of(data)) is None:
            return None
        data = parts.get(_key(step, parts))
    return data


def _put(data: Any, path: list[str], leaf: Tensor) -> Any:
    """The data with another leaf at the end of a path that exists. Only collections on the path are new."""
    if not path or (parts := parts_of(data)) is None:
        return leaf
    key = _key(path[0], parts)
    return with_parts(data, {**parts, key: _put(parts[key], path[1:], leaf)})


def _names_in(data: Any) -> str:
    return ", ".join(_tensor_names(data, "")) or f"none: it is of type {type(data).__name__}"


def _tensor_names(data: Any, prefix: str) -> Iterator[str]:
    for key, part in (parts_of(data) or {}).items():
        name = f"{prefix}{key}"
        if isinstance(part, Tensor):
            yield f"`{name}` {tuple(part.shape)}"
        yield from _tensor_names(part, f"{name}.")


def _size(tensor: Tensor, dim: int, name: str) -> int:
    if not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"{_shown(name)} has no dimension {dim}: its shape is {tuple(tensor.shape)}.")
    return tensor.shape[dim]


def _padded(tensor: Tensor, pad: Pad, length: int, side: str, name: str) -> Tensor:
    missing = length - tensor.shape[pad.dim]
    if not missing:
        return tensor
    if isinstance(pad.value, float) and not tensor.is_floating_point() and not pad.value.is_integer():
        raise ValueError(f"{_shown(name)} of dtype {tensor.dtype} cannot be padded with {pad.value}.")
    # `functional.pad` counts from the last dimension.
    widths = [0, 0] * (-pad.dim if pad.dim < 0 else tensor.dim() - pad.dim)
    widths[-1 if side == "right" else -2] = missing
    return torch.nn.functional.pad(tensor, widths, value=pad.value)


def _narrowed(tensor: Tensor, dim: int, length: int, side: str) -> Tensor:
    size = tensor.shape[dim]
    return tensor if size <= length else tensor.narrow(dim, 0 if side == "right" else size - length, length)
