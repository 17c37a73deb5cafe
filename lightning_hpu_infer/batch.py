"""One batch on its way, with all that its end hooks read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning_hpu_infer.lengths.buckets import Lengths


@dataclass(slots=True)
class Batch:
    """A batch, from the dataloader to its prediction. The loop is at later batches when its end hooks run."""

    index: int
    """Its index in the run, over all dataloaders."""
    data: Any
    """As the dataloader yielded it, or prepared for the copy; None once it is on the device."""
    batch_idx: int
    """Its index in its dataloader."""
    dataloader_idx: int
    is_last: bool
    """Whether it is its dataloader's last one."""
    lengths: Lengths | None = None
    """Its length before and after padding; None if it was not padded."""
    wanted: bool = False
    """Whether its prediction is returned or written."""
    late_hooks: list[Any] | None = None
    """Its end hooks, if they run when its output has arrived; None if they run right after its step."""
    hook_args: tuple[Any, ...] = ()
    """What its hooks and its step are called with: the batch on the device, and its indices."""
    sample_indices: Any = None
    """The dataset's indices of its samples, for prediction writers."""
    counters: "Counters" = ()
    """`counters_of` the progress after its step."""

    def __str__(self) -> str:
        """Its name in messages."""
        return f"batch {self.batch_idx} of dataloader {self.dataloader_idx}"


Counters = tuple[tuple[int, int, int], ...]


def counters_of(progress: Any) -> Counters:
    """How many batches are ready, started and processed, in this run and in all runs.

    Args:
        progress: The `batch_progress` of a loop.
    """
    return tuple((tracker.ready, tracker.started, tracker.processed) for tracker in (progress.current, progress.total))


def _show(loop: Any, counters: Counters, is_last: bool, sample_indices: Any) -> None:
    progress = loop.batch_progress
    for tracker, counts in zip((progress.current, progress.total), counters, strict=True):
        tracker.ready, tracker.started, tracker.processed = counts
    progress.is_last_batch, loop.current_batch_indices = is_last, sample_indices


@contextmanager
def shown_to_hooks(loop: Any, batch: Batch) -> Iterator[None]:
    """Let hooks see the loop as it was after the step of a batch, though later batches were launched since.

    `BasePredictionWriter` reads the indices, and other callbacks the counters, from the loop when they are called. The
    counter `completed` stays, since it counts end hooks that have run. After an error the batch stays in view.
    """
    progress = loop.batch_progress
    newest = counters_of(progress), progress.is_last_batch, loop.current_batch_indices
    _show(loop, batch.counters, batch.is_last, batch.sample_indices)
    yield
    _show(loop, *newest)
