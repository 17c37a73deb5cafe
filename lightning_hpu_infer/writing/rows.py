"""How many samples a batch has whose dataloader does not tell."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from lightning_hpu_infer.nested import parts_of, tensors_in
from lightning_hpu_infer.writing.arrays import is_sequence


def rows_of(prediction: Any, batch: Any, names: Collection[str] | None = None, *, collated: bool = True) -> int | None:
    """Samples of a batch: as many as its prediction has rows.

    If the prediction does not tell, as None, it is the length of the first tensor or list of the batch; and so it is if
    all tensors of the batch have one length and the prediction another, which is then found not to fit.

    Args:
        prediction: What the step, or post-processing, returned for the batch.
        batch: What was predicted, on any device.
        names: Which parts of the prediction are written; all by default.
        collated: Whether the dataloader makes batches of samples. Otherwise one sample may be a tensor of any length.

    Returns:
        None if nobody tells.
    """
    rows, sizes = _rows(prediction, names), list(_sizes(batch))
    lengths = {len(tensor) for tensor in tensors_in(batch) if tensor.ndim}
    if rows is None or (collated and len(lengths) == 1 and rows not in sizes):
        return sizes[0] if sizes else None
    return rows


def _rows(prediction: Any, names: Collection[str] | None = None) -> int | None:
    if _is_array(prediction):
        return len(prediction) if prediction.ndim else None
    if is_sequence(prediction):
        # Several tensors for the batch, more likely than one per sample.
        fields = isinstance(prediction, tuple) and all(_is_array(part) and part.ndim for part in prediction)
        return None if fields else len(prediction)
    parts = [part for name, part in (parts_of(prediction) or {}).items() if names is None or str(name) in names]
    parts.sort(key=lambda part: not _is_array(part))  # Tensors tell best.
    return next((rows for part in parts if (rows := _rows(part)) is not None), None)


def _sizes(data: Any) -> Iterator[int]:
    """The lengths of tensors and lists: of fields first, then of the list that holds them."""
    if _is_array(data):
        if data.ndim:
            yield len(data)
        return
    # Lists of numbers or strings may be long.
    if not (is_sequence(data) and data and not _is_array(data[0]) and parts_of(data[0]) is None):
        for part in (parts_of(data) or {}).values():
            yield from _sizes(part)
    if is_sequence(data):
        yield len(data)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)
