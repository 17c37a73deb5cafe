"""What batches and outputs show about padding, where nobody has said it: `lengths="auto"`."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from lightning_hpu_infer.nested import parts_of

_Place = tuple[tuple[str, ...], int]
"""A path in an output, and a dimension."""


class Evidence:
    """Lets batches be padded once it is seen that this can be undone.

    That is: the collate function pads on the right, so that the model expects padding there; and batches of different
    lengths have run, whose outputs tell whether they have a value per token. `length_for` and `check` may be called by
    a thread each.

    Args:
        in_order: Whether batches run in the order in which they are prepared, and the first error ends the run, as in a
            Trainer's. Else a batch that was prepared may run later, or never, and counts once its output was seen.
    """

    def __init__(self, *, in_order: bool) -> None:
        self._in_order = in_order
        self._pads_right = False
        self._lengths: frozenset[int] = frozenset()
        self._sizes: dict[int, dict[_Place, int]] = {}
        self._is_done = self._refuses = False

    def length_for(self, batch: Any, length: int, bucket: int) -> int:
        """The length that a batch is to have: that of its bucket, or its own while too little is known.

        Raises:
            ValueError: If its padding cannot be told, or is on the left.
        """
        self._look_at(batch)
        found = bucket if self._pads_right and self._lengths - {bucket} else length
        if self._in_order:
            self._lengths |= {found}
        return found

    def check(self, output: Any, length: int, padded: int) -> None:
        """Look at the output of a batch that was padded, or not.

        Raises:
            ValueError: If outputs grow with the length of their batches, and so with the padding.
        """
        if self._is_done:
            return
        sizes = _sizes(output)
        if length == padded:
            if len(self._sizes) < 2:
                self._sizes.setdefault(length, sizes)
            if not self._in_order:
                self._lengths = frozenset(self._sizes)
            return
        for other, found in self._sizes.items():
            if other == padded:
                continue
            for (path, dim), size in sizes.items():
                if padded - size == other - found.get((path, dim), -1):
                    self._refuses = True
                    name = f" at `{'.'.join(path)}`" if path else ""
                    raise ValueError(
                        f"The output{name} has the padded length in dimension {dim}: {size} for a batch of length"
                        f" {length} that `lengths='auto'` has padded to {padded}. Name it, with the dimension, in"
                        " `outputs` of a `pad_spec`, by which it is cut; or leave out `lengths`."
                    )
            # What was refused once is looked at for as long as batches come.
            self._is_done = not self._refuses

    def _look_at(self, batch: Any) -> None:
        parts = parts_of(batch) or {}
        ids, mask = parts.get("input_ids"), parts.get("attention_mask")
        if not isinstance(ids, Tensor) or not isinstance(mask, Tensor) or ids.dim() != 2 or mask.shape != ids.shape:
            raise ValueError(
                "`lengths='auto'` pads `input_ids` of shape (batch, length) that have an `attention_mask` of the same"
                f" shape, got {_shown(ids)} and {_shown(mask)}. Say with a `pad_spec` what is padded, or leave out"
                " `lengths`."
            )
        mask = mask[mask.any(1)]  # of an empty text nothing shows
        if not bool(mask[:, :1].all()):
            raise ValueError(
                "`lengths='auto'` pads on the right, and the attention mask of a batch begins with 0: it is padded on"
                " the left. If more padding there does not change what the model computes, pass"
                " `pad_spec=PadSpec.tokenizer(side='left')`; else leave out `lengths`."
            )
        self._pads_right = self._pads_right or not bool(mask[:, -1:].all())


def _sizes(data: Any) -> dict[_Place, int]:
    found: dict[_Place, int] = {}
    for place, size in _sizes_in(data, (), in_list=False):
        found[place] = max(size, found.get(place, 0))
    return found


def _sizes_in(data: Any, path: tuple[str, ...], *, in_list: bool) -> Iterator[tuple[_Place, int]]:
    """Sizes in an output but for its rows; those of what is in lists without their indices."""
    if isinstance(data, Tensor | np.ndarray):
        yield from (((path, dim), size) for dim, size in enumerate(data.shape) if dim or in_list)
    elif isinstance(data, list):
        if in_list:
            yield (path, 0), len(data)
        for part in data:
            yield from _sizes_in(part, path, in_list=True)
    else:
        for name, part in (parts_of(data) or {}).items():
            yield from _sizes_in(part, (*path, str(name)), in_list=in_list)


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
