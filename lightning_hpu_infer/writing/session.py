"""One run's writing: what is done already, each batch on its way to the thread, and the end."""

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_hpu_infer.lengths.order import disorder, hands_over_any
from lightning_hpu_infer.nested import size_of
from lightning_hpu_infer.observer import Lane, Observer, Stage
from lightning_hpu_infer.samples import Done, batching_of, has_indices, is_shuffled, positions_of
from lightning_hpu_infer.transfer import host_copy
from lightning_hpu_infer.writing.background import Background
from lightning_hpu_infer.writing.columns import Columns
from lightning_hpu_infer.writing.fingerprint import fingerprint_of
from lightning_hpu_infer.writing.manifest import Stretch
from lightning_hpu_infer.writing.opening import open_path
from lightning_hpu_infer.writing.rows import rows_of

Indices = npt.NDArray[np.int64]
_ITEM_BYTES = 1024
"""What a batch takes in the queue beside its prediction, so that very many small ones are bounded too: measured."""


@dataclass(frozen=True)
class _Item:
    """What the thread writes: one batch's prediction, which nobody else has."""

    prediction: Any
    index: Indices
    keep: npt.NDArray[np.bool_] | None
    """Which samples are not committed by an earlier run; None for all."""
    stretch: Stretch | None
    """Where they are in a stream."""
    dataloader_idx: int
    ids: Any
    where: str
    batch: int


class Session:
    """Writes the predictions of one run on one rank. Main thread only, but for the thread that it starts.

    Args:
        writer: A `PredictionWriter`, with its options.
        trainer: Whose run begins. Its module has the weights that it predicts with.
        loaders: Its dataloaders, as Lightning has made them for prediction.
        skips: Whether the loop leaves out the samples that are done.
        observer: Is told when the thread writes.

    Raises:
        FileExistsError: If the folder holds something else; or predictions, and the writer does not resume.
        MisconfigurationException: If workers hand over batches in any order; or if predictions are there of samples
            that are without indices and shuffled.
        RuntimeError: If another run writes to it.
        ValueError: If the predictions that are there were made with other weights, datasets or steps.
    """

    def __init__(
        self, writer: Any, trainer: Trainer, loaders: Sequence[object], *, skips: bool, observer: Observer
    ) -> None:
        _check_order(loaders)
        self._loaders = loaders
        self._streams = {number for number, loader in enumerate(loaders) if not has_indices(loader)}
        self._rank, self._world = trainer.global_rank, trainer.world_size
        self._id_key = writer.id_key
        self._names = None if writer.columns is None else list(writer.columns)
        self._observer = observer
        self._batches = 0
        self._spans: deque[tuple[float, float, int]] = deque()
        """When the thread wrote which batch, until the main thread has told the observer."""
        self._opened = open_path(
            writer.path,
            self._rank,
            self._world,
            fingerprint=fingerprint_of(trainer, trainer.lightning_module, loaders),
            resume=writer.resume,
            overwrite=writer.overwrite,
            agree=trainer.strategy.reduce_boolean_decision,
        )
        try:
            self._check_repeatable()
            self.committed = {number: self._of_rank(number, found) for number, found in self._opened.done.items()}
            """Per dataloader, the samples that are committed: their indices in the dataset; for a dataloader without
            indices, the numbers that this rank gave them."""
            starts = {number: self._opened.manifest.start_of(number) if skips else (0, 0) for number in self._streams}
            self._numbers = {number: rows for number, (rows, _) in starts.items()}
            """How many rows of each stream have got a number."""
            self.done = Done(
                samples={number: found for number, found in self.committed.items() if number not in self._streams},
                batches={number: batches for number, (_, batches) in starts.items() if batches},
            )
            """What the loop leaves out."""
            self._came = {number: np.zeros(len(found), bool) for number, found in self.committed.items()}
            """Which of the committed samples have come in this run too."""
            self._columns = Columns(writer.columns, self._opened.schema)
            self._shards = self._opened.shards(
                rows_per_file=writer.rows_per_file,
                seconds_per_file=writer.seconds_per_file,
                compression=writer.compression,
            )
            self._background = Background(
                self._write, writer.queue_bytes, on_done=self._note if observer.records else None
            )
        except BaseException:
            self._opened.release()
            raise

    def add(self, prediction: Any, indices: Sequence[int] | None, batch: Any, batch_idx: int, loader: int) -> None:
        """Hand a batch's prediction to the thread; wait while too many bytes wait for it.

        Args:
            prediction: On any device. It is copied, since others may change what they are given as well, and a step may
                return memory that it fills again.
            indices: The dataset's indices of its samples, if they are known.
            batch: What was predicted, on any device.
            batch_idx: Its index in its dataloader.
            loader: The index of its dataloader.

        Raises:
            MisconfigurationException: If a sample comes several times and is committed.
            Exception: What went wrong in the thread with an earlier batch.
        """
        self._report()
        where = f"batch {batch_idx} of dataloader {loader}"
        stretch = None
        if loader not in self._streams:
            index = positions_of(indices or (), where)
        else:
            stretch = self._stretch(prediction, batch, batch_idx, loader, where)
            index = np.arange(stretch[0], stretch[1], dtype=np.int64) * self._world + self._rank
        keep = self._not_committed(index, loader)
        ids = None if self._id_key is None else host_copy(_part(batch, self._id_key, where))
        item = _Item(host_copy(prediction), index, keep, stretch, loader, ids, where, self._batches)
        self._batches += 1
        size = size_of((item.prediction, item.ids, item.index)) + _ITEM_BYTES
        self._observer.timed(Stage.WAIT_WRITER, self._background.put, item, size, where)

    def close(self, *, complete: bool) -> None:
        """Write what waits, commit it, and let others use the folder.

        Args:
            complete: Whether the run has come to its end.

        Raises:
            Exception: What went wrong in the thread.
        """
        try:
            self._background.close()
            self._shards.close(complete=complete)
            self._report()
        finally:
            try:
                self._shards.close(complete=False)  # what came before an error in the thread
            finally:
                self._opened.release()

    def _write(self, item: _Item) -> None:
        rows = self._columns.batch(
            item.prediction, len(item.index), item.index.tolist(), item.dataloader_idx, item.ids, where=item.where
        )
        self._shards.write(rows if item.keep is None else rows.filter(item.keep), item.stretch)

    def _note(self, start: float, end: float, item: _Item) -> None:
        self._spans.append((start, end, item.batch))

    def _report(self) -> None:
        while self._spans:
            start, end, batch = self._spans.popleft()
            self._observer.add(Stage.WRITE, Lane.WRITER, start, end, batch)

    def _check_repeatable(self) -> None:
        """Refuse to go on with samples that are known by when they came only, if they come in another order now."""
        for number in self._streams & self._opened.done.keys():
            if is_shuffled(self._loaders[number]):
                raise MisconfigurationException(
                    f"Dataloader {number} is shuffled, and which samples its batches have is not known. So it is not"
                    " known which of them are predicted already. Let it yield them in order, predict into another"
                    " folder, or pass `overwrite=True`."
                )

    def _not_committed(self, index: Indices, loader: int) -> npt.NDArray[np.bool_] | None:
        """Which samples of a batch are not committed by an earlier run; None for all."""
        done = self.committed.get(loader)
        if done is None:
            return None
        found: npt.NDArray[np.bool_] = _isin_sorted(index, done)
        places, came = np.searchsorted(done, index[found]), self._came[loader]
        ordered = np.sort(places)
        if len(again := [*places[came[places]], *ordered[1:][np.diff(ordered) == 0]]):
            raise MisconfigurationException(
                f"The sampler yields samples several times, sample {done[again[0]]} for one, and this one is predicted"
                " already. It is not known how often. Predict into another folder, or pass `overwrite=True`."
            )
        came[places] = True
        return ~found

    def _of_rank(self, number: int, indices: Indices) -> Indices:
        if number in self._streams:
            indices = indices[indices % self._world == self._rank]
        return indices

    def _stretch(self, prediction: Any, batch: Any, batch_idx: int, loader: int, where: str) -> Stretch:
        """Where a batch's rows are in its stream, of which each rank counts its own."""
        loads, batching = self._loaders[loader], batching_of(self._loaders[loader])
        collated = batching is not loads or getattr(loads, "batch_size", None) is not None
        rows = rows_of(prediction, batch, self._names, collated=collated)
        if rows is None:
            raise MisconfigurationException(
                f"{where}: `PredictionWriter` cannot tell how many samples it has. Its dataloader has no batch sampler,"
                f" and neither the prediction ({type(prediction).__name__}) nor the batch ({type(batch).__name__}) has"
                " a tensor or list. Return a list with one value per sample."
            )
        first = self._numbers[loader]
        self._numbers[loader] += rows
        return [first, first + rows, batch_idx + 1]


def _isin_sorted(values: Indices, found: Indices) -> Any:
    """Which values are among the sorted ones, of which there may be very many, or none."""
    if not len(found):
        return np.zeros(len(values), bool)
    at = np.searchsorted(found, values)
    return (at < len(found)) & (found[np.minimum(at, len(found) - 1)] == values)


def _check_order(loaders: Sequence[Any]) -> None:
    for number, loader in enumerate(loaders):
        if hands_over_any(loader):
            raise MisconfigurationException(
                f"Dataloader {number} has `in_order=False`, so its workers hand over whatever is ready first, and"
                " `PredictionWriter` cannot tell which samples a batch has. Leave `in_order` out, or pass"
                " `num_workers=0`."
            )
        if batching_of(loader) is not loader and (reason := disorder(loader)):
            rank_zero_warn(
                f"Dataloader {number}, of class {type(loader).__name__}, {reason}, so which samples its batches have is"
                " not known. They are numbered in the order in which they come. If that matters, pass `id_key`."
            )


def _part(batch: Any, name: str, where: str) -> Any:
    with suppress(KeyError, TypeError, IndexError):
        return batch[name]
    # Of collections these are methods.
    found = None if isinstance(batch, Tensor | list) or type(batch) is tuple else getattr(batch, name, None)
    if found is not None and not callable(found):
        return found
    shown = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else f"it is of type {type(batch).__name__}"
    raise ValueError(f"{where}: `id_key` is {name!r}, which the batch does not have: {shown}.")
