"""A dataloader whose batches are of like lengths, and its predictions in the order of the dataset."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader

from lightning_hpu_infer.grouping import GroupBy, Restorer, grouped_order, lengths_of


class Reordered:
    """One dataloader of a run: lets it yield samples by length, and collects predictions in their stock order.

    Args:
        loader: Made by Lightning for prediction. It is changed: the sampler of its batch sampler is replaced.
        max_batches: Batches that the run takes of it.
        by: What tells a sample's length.

    Raises:
        MisconfigurationException: If the loader has not the usual batches, consecutive samples of a sampler.
        TypeError: If its dataset is not map-style, or a length is no integer.
        ValueError: If a length is missing or negative.
    """

    def __init__(self, loader: object, max_batches: float, by: GroupBy) -> None:
        wrapper = getattr(loader, "batch_sampler", None)
        batches = wrapper._batch_sampler if isinstance(wrapper, _IndexBatchSamplerWrapper) else None
        if not isinstance(loader, DataLoader) or type(batches) is not BatchSampler:
            raise MisconfigurationException(
                "`group_by_length` needs a DataLoader of a map-style dataset with a `batch_size`, got"
                f" {type(loader).__name__} with {type(batches or wrapper).__name__}. Let DataLoader make the batches,"
                " or pass `group_by_length=None`."
            )
        size = batches.batch_size
        # With a limit, the samples are those that stock Lightning would predict.
        self._samples = list(batches.sampler)[: int(min(max_batches * size, 2**62))]
        lengths = lengths_of(loader.dataset, self._samples, by)
        # Places, not samples, since a sampler may repeat one.
        order = grouped_order(range(len(self._samples)), lengths)
        batches.sampler = [self._samples[place] for place in order]
        self._batches = [order[start : start + size] for start in range(0, len(order), size)]
        self.longest = [max(lengths[place] for place in batch) for batch in self._batches]
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
                " the dataset. Predict all of them (fewer: `limit_predict_batches`), or pass `group_by_length=None`."
            )
        return self._restorer.batches()

    def batch_indices(self) -> list[list[int]]:
        """The dataset's indices of each batch of stock Lightning."""
        return [[self._samples[place] for place in batch] for batch in self._restorer.batch_indices()]
