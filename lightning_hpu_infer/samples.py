"""Which samples a run predicts, and in which order: those that are not written yet, by length if asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil, inf
from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import BatchSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lightning_hpu_infer._lightning import forget_indices, set_batch_sampler, users_batch_sampler
from lightning_hpu_infer.batch import Batch
from lightning_hpu_infer.lengths.order import GroupBy, Reordered, disorder

GRAPH_PER_LENGTH = (
    "`group_by_length` without `bucket_lengths`: each length needs its own graph. Pass `lengths='auto'` for batches"
    " of a tokenizer, or `bucket_lengths` with a `pad_spec`."
)


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a run is to leave out, since its predictions are kept elsewhere."""

    samples: Mapping[int, npt.NDArray[np.int64]]
    """Per dataloader whose samples have indices, those in the dataset. They are not loaded."""
    batches: Mapping[int, int]
    """Per dataloader whose samples have none, how many batches at its beginning. They are loaded, and dropped before a
    hook has changed them."""


class Samples:
    """Lets the dataloaders of a run yield what is to be predicted, and puts its predictions in stock order.

    Args:
        loaders: Made by Lightning for prediction. They are changed: batches are made of other samples.
        max_batches: Batches that the run would take of each.
        by: What tells a sample's length, if batches are made in order of length.
        done: What to leave out; None without a writer that keeps it.

    Raises:
        MisconfigurationException: If some samples are to be left out and a sampler yields one several times, or yields
            other than positions; or if batches cannot be made in order of length.
        TypeError: As `Reordered` does.
        ValueError: As `Reordered` does.
    """

    def __init__(
        self,
        loaders: Sequence[object],
        max_batches: Sequence[float],
        by: GroupBy | None = None,
        done: Done | None = None,
    ) -> None:
        self._loaders = loaders
        self._forgets = done is not None
        self.max_batches = list(max_batches)
        """Batches that the run takes of each dataloader."""
        self.totals = self.max_batches
        """Those, and the batches that are left out."""
        self._skipped = {} if done is None else done.batches
        if done is not None:
            left = [
                _without(loader, batches, done.samples.get(number, np.empty(0, np.int64)), f"Dataloader {number}")
                for number, (loader, batches) in enumerate(zip(loaders, max_batches, strict=True))
            ]
            self.totals, self.max_batches = [total for total, _ in left], [batches for _, batches in left]
        self.first = [
            int(total - now) if now < inf else 0 for total, now in zip(self.totals, self.max_batches, strict=True)
        ]
        """Index of each dataloader's first batch, so that indices go on where an earlier run stopped."""
        pairs = zip(loaders, self.max_batches, strict=True)
        self._reordered = [] if by is None else [Reordered(loader, batches, by) for loader, batches in pairs]

    @property
    def longest(self) -> list[int]:
        """The length of each batch; empty unless batches are made in order of length."""
        return [length for loader in self._reordered for length in loader.longest]

    @property
    def collectors(self) -> list[Any] | None:
        """One object per dataloader to append predictions to, if lists would have them in another order than stock."""
        return list(self._reordered) or None

    def predictions(self) -> list[Any]:
        """What the collectors have, as lists in stock order."""
        return [loader.predictions() for loader in self._reordered]

    def batch_indices(self) -> list[list[list[int]]]:
        """The dataset's indices of the samples of each prediction of `predictions`."""
        return [loader.batch_indices() for loader in self._reordered]

    def noted(self, note: Callable[[int, int], bool], batch: Batch) -> bool:
        """Call what notes the indices of a batch for writers.

        Lightning keeps those of all batches. It is made to forget them where a writer of ours is to keep memory flat,
        and nowhere else, since callbacks of the user's may look there.
        """
        found = note(batch.batch_idx, batch.dataloader_idx)
        if self._forgets:
            forget_indices(self._loaders[batch.dataloader_idx], batch.batch_idx)
        return found

    def without_skipped(self, fetcher: Any) -> Any:
        """A data fetcher that drops what is left out at the beginning of dataloaders without indices."""
        return _Skipping(fetcher, self._skipped) if self._skipped else fetcher


def has_indices(loader: object) -> bool:
    """Whether it is known which samples of the dataset each batch of a dataloader has."""
    return users_batch_sampler(getattr(loader, "batch_sampler", None)) is not None and not disorder(loader)


def batching_of(loader: Any) -> Any:
    """What has the `sampler` and `batch_size` of a dataloader: the user's batch sampler, or the dataloader itself."""
    batches = users_batch_sampler(getattr(loader, "batch_sampler", None))
    return loader if batches is None else batches


def is_shuffled(loader: Any) -> bool:
    """Whether a dataloader is seen to yield its samples in another order in each run."""
    sampler = getattr(batching_of(loader), "sampler", None)
    return isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler)


def positions_of(samples: Sequence[Any], where: str) -> npt.NDArray[np.int64]:
    """What a sampler has yielded, as positions in the dataset.

    Args:
        samples: The indices, integers of any type.
        where: Whose, at the beginning of an error.

    Raises:
        MisconfigurationException: If one is no integer.
    """
    try:
        return np.fromiter(map(index, samples), np.int64, len(samples))
    except (TypeError, OverflowError):
        shown = next((sample for sample in samples if not hasattr(sample, "__index__")), samples[0])
        raise MisconfigurationException(
            f"{where}: its sampler yields {shown!r}, and `PredictionWriter` knows samples by their positions in the"
            " dataset. Let the sampler yield integers, and the dataset's `__getitem__` look up what they stand for."
        ) from None


def _without(loader: Any, max_batches: float, done: npt.NDArray[np.int64], where: str) -> tuple[float, float]:
    """Leave samples out of a dataloader; gives its batches with them, and those without."""
    wrapper: Any = getattr(loader, "batch_sampler", None)
    batches = users_batch_sampler(wrapper)
    if batches is None or not len(done):
        return max_batches, max_batches
    if type(batches) is not BatchSampler:
        # Whatever the user's sampler puts together stays together.
        found = [list(batch) for batch in islice(batches, int(min(max_batches, 2**62)))]
        kept = iter(_not_done([sample for batch in found for sample in batch], done, where))
        made = [[sample for sample in batch if next(kept)] for batch in found]
        left = [batch for batch in made if batch]
        set_batch_sampler(wrapper, left)
        return len(found), len(left)
    size = batches.batch_size
    samples = list(islice(batches.sampler, int(min(max_batches * size, 2**62))))  # It may be endless.
    batches.sampler = [sample for sample, keep in zip(samples, _not_done(samples, done, where), strict=True) if keep]
    return ceil(len(samples) / size), ceil(len(batches.sampler) / size)


def _not_done(samples: Sequence[Any], done: npt.NDArray[np.int64], where: str) -> list[bool]:
    positions = positions_of(samples, where)
    if (different := len(np.unique(positions))) < len(positions):
        raise MisconfigurationException(
            f"The sampler yields samples several times ({len(positions)} samples, {different} different ones). It is"
            " not known which of them are predicted already. Predict into another folder, or pass `overwrite=True`."
        )
    return [bool(keep) for keep in np.isin(positions, done, invert=True)]


class _Skipping:
    """A data fetcher without the first batches of dataloaders."""

    def __init__(self, fetcher: Any, skipped: Mapping[int, int]) -> None:
        self._fetcher = fetcher
        self._skipped = skipped

    @property
    def done(self) -> bool:
        return bool(self._fetcher.done)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            item = next(self._fetcher)
            _, batch_idx, dataloader_idx = item
            if batch_idx >= self._skipped.get(dataloader_idx, 0):
                return item
