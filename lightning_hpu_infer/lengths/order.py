"""A dataloader whose batches are of like lengths, and its predictions in the order of the dataset."""

from collections.abc import Callable, Sequence
from itertools import islice
from operator import index
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_hpu_infer._lightning import users_batch_sampler
from lightning_hpu_infer.lengths.restore import OFF, Restorer
from lightning_hpu_infer.nested import parts_of

GroupBy = str | Sequence[int] | Callable[[Any], int]
"""How to tell a sample's length: a key of the sample, a function of the sample, or one length per sample."""


def lengths_of(dataset: Any, indices: Sequence[int], group_by: GroupBy) -> list[int]:
    """The lengths of samples.

    A key or a function loads each sample once, in addition to its prediction. Lengths that are known are free.

    Args:
        dataset: A map-style dataset.
        indices: The samples asked for.
        group_by: A key, for `len(sample[key])`; a function of the sample; or the length of each sample of the dataset.

    Returns:
        One length for each of `indices`.

    Raises:
        TypeError: If the dataset is not map-style, or a length is not an integer.
        ValueError: If a length is negative, there are not as many lengths as samples, or a sample lacks the key.
    """
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(
            f"Samples can be grouped by length in a map-style dataset only, with `__getitem__` and `__len__`, and"
            f" {type(dataset).__name__} is not one. Make it one, {OFF}."
        )
    if isinstance(group_by, str):
        lengths: list[Any] = [_length_under(group_by, dataset[i], i) for i in indices]
    elif callable(group_by):
        lengths = [group_by(dataset[i]) for i in indices]
    elif len(group_by) == len(dataset):
        lengths = [group_by[i] for i in indices]
    else:
        raise ValueError(
            f"`group_by_length` has {len(group_by)} lengths for a dataset of {len(dataset)} samples. Give one for each."
        )
    return [_checked(length, i) for length, i in zip(lengths, indices, strict=True)]


def _length_under(key: str, sample: Any, at: int) -> int:
    try:
        return len(sample[key])
    except (KeyError, IndexError, TypeError) as error:
        names = ", ".join(map(repr, parts_of(sample) or {})) or f"none: it is of type {type(sample).__name__}"
        raise ValueError(
            f"Sample {at} has nothing with a length under {key!r}. It has {names}. Give `group_by_length`"
            " another key, or a function of the sample."
        ) from error


def _checked(length: Any, at: int) -> int:
    if isinstance(length, bool) or not hasattr(length, "__index__"):
        raise TypeError(f"The length of sample {at} must be an integer, got {length!r}. Correct `group_by_length`.")
    if index(length) < 0:
        raise ValueError(f"The length of sample {at} must not be negative, got {length}. Correct `group_by_length`.")
    return index(length)


def grouped_order(indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The indices, longest sample first, and in their given order where lengths are equal.

    So the batches made of them are of like lengths, and the largest comes first: if memory does not suffice, the
    first batch tells.

    Args:
        indices: Samples in stock order. An index that is there twice stays there twice.
        lengths: One for each of `indices`.
    """
    by_length = sorted(range(len(indices)), key=lambda position: -lengths[position])
    return [indices[position] for position in by_length]


def disorder(loader: object) -> str:
    """Why a dataloader may yield other batches than its batch sampler, or in another order; empty if it does not."""
    if hands_over_any(loader):
        return "has `in_order=False`, so its workers hand over whatever is ready first"
    made_by = ("__iter__", "_get_iterator")
    own = [name for name in made_by if getattr(type(loader), name, None) is not getattr(DataLoader, name)]
    return f"has `{own[0]}` of its own" if own else ""


def hands_over_any(loader: Any) -> bool:
    """Whether the workers of a dataloader hand over batches in whatever order they are ready."""
    return bool(getattr(loader, "num_workers", 0)) and not getattr(loader, "in_order", True)


def _draw_seed_of_workers(loader: DataLoader[Any]) -> None:
    """Draw a dataloader's seed of its workers now, before its sampler draws, as its iterator does (torch 2.13).

    So the sampler yields what it would yield in stock Lightning. The iterator draws the same seed of a generator that
    is like the one before.
    """
    own = torch.default_generator if loader.generator is None else loader.generator
    before = torch.Generator(own.device)
    before.set_state(own.get_state())
    torch.empty((), dtype=torch.int64).random_(generator=own)
    loader.generator = before


class Reordered:
    """One dataloader of a run: lets it yield samples by length, and collects predictions in their stock order.

    Args:
        loader: Made by Lightning for prediction. It is changed: the sampler of its batch sampler is replaced.
        max_batches: Batches that the run takes of it.
        by: What tells a sample's length.

    Raises:
        MisconfigurationException: If the loader has not the usual batches, consecutive samples of a sampler, in order.
        TypeError: If its dataset is not map-style, or a length is no integer.
        ValueError: If a length is missing or negative.
    """

    def __init__(self, loader: object, max_batches: float, by: GroupBy) -> None:
        sampler = getattr(loader, "batch_sampler", None)
        batches = users_batch_sampler(sampler)
        if not isinstance(loader, DataLoader) or type(batches) is not BatchSampler:
            raise MisconfigurationException(
                "`group_by_length` needs a DataLoader of a map-style dataset with a `batch_size`, got"
                f" {type(loader).__name__} with {type(batches or sampler).__name__}. Let DataLoader make the batches,"
                f" {OFF}."
            )
        if reason := disorder(loader):
            raise MisconfigurationException(
                f"`group_by_length` needs batches in the order of the sampler, and {type(loader).__name__} {reason}."
                f" Use a plain DataLoader with `in_order=True`, {OFF}."
            )
        size = batches.batch_size
        # With a limit, the samples are those that stock Lightning would predict. A sampler may be endless.
        _draw_seed_of_workers(loader)
        self._samples = list(islice(batches.sampler, int(min(max_batches * size, 2**62))))
        lengths = lengths_of(loader.dataset, self._samples, by)
        # Positions, not samples, since a sampler may repeat one.
        order = grouped_order(range(len(self._samples)), lengths)
        batches.sampler = [self._samples[position] for position in order]
        self._batches = [order[start : start + size] for start in range(0, len(order), size)]
        self.longest = [max(lengths[position] for position in batch) for batch in self._batches]
        """Length of each batch, as `by` tells it."""
        self._restorer = Restorer(range(len(order)), size)
        self._count = 0

    def append(self, prediction: Any) -> None:
        """Take the prediction of the next batch.

        Raises:
            ValueError: If it cannot be split into samples.
        """
        self._restorer.add(self._batches[self._count], prediction)
        self._count += 1

    def predictions(self) -> list[Any]:
        """One prediction per batch of stock Lightning, empty if none was taken.

        Raises:
            ValueError: If some are missing.
        """
        if not self._count:
            return []
        if self._count < len(self._batches):
            raise ValueError(
                f"The run ended after {self._count} of {len(self._batches)} batches, as a step or hook that raises"
                " `StopIteration` makes it end, and was in order of length: what was predicted is not the beginning of"
                f" the dataset. Predict all of them (fewer: `limit_predict_batches`), {OFF}."
            )
        return self._restorer.batches()

    def batch_indices(self) -> list[list[int]]:
        """The dataset's indices of each batch of stock Lightning."""
        return [[self._samples[position] for position in batch] for batch in self._restorer.batch_indices()]
