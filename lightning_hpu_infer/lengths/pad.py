"""What of a batch is padded to a length, and which outputs are cut back. Frozen values, for host tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hpu_infer.nested import parts_of, with_parts


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
            ValueError: If a named output is not there, or does not have the padded length in its dimension.
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
                    f"Output {_shown(name)} of shape {tuple(tensor.shape)} does not have the padded length"
                    f" {padded or f'of at least {length}'} in dimension {dim}. Correct `outputs` of the `PadSpec`."
                )
            output = _put(output, _path(name), _narrowed(tensor, dim, length, self.side))
        return output

    def _inputs_of(self, batch: Any) -> Iterator[tuple[str, Pad, Tensor]]:
        for number, (name, pad) in enumerate(self.inputs.items()):
            tensor = _get(batch, _path(name))
            if isinstance(tensor, Tensor):
                _size(tensor, pad.dim, name)
                yield name, pad, tensor
            elif number == 0 or tensor is not None:
                found = "" if tensor is None else f" (it is of type {type(tensor).__name__})"
                raise ValueError(
                    f"The batch has no tensor {_shown(name)}{found}, which `PadSpec` names. It has {_names_in(batch)}."
                )


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
