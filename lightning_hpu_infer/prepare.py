"""What is done to a batch on the host before the device reads it, without a Trainer."""

import threading
from collections.abc import Callable
from typing import Any

from lightning_hpu_infer.arrays import as_tensors
from lightning_hpu_infer.lengths.buckets import Buckets
from lightning_hpu_infer.observer import Lane, Observer, Stage
from lightning_hpu_infer.ownership import owned
from lightning_hpu_infer.transfer import pin
from lightning_hpu_infer.work import Work


class Preparation:
    """Converts batches, pads them and moves them to memory that stays as it is. Any thread, one at a time.

    Args:
        convert: `on_before_batch_transfer` of the model; None if it does nothing.
        buckets: Pads batches.
        observer: Observes the stages.
        pins: Whether that memory is pinned.
    """

    def __init__(
        self, convert: Callable[[Any], Any] | None, buckets: Buckets, observer: Observer, *, pins: bool
    ) -> None:
        self._hook = convert
        self._pins = pins
        self._observer = observer
        # The hook, and the choice of buckets, are for one thread at a time.
        self._lock = threading.Lock()
        self._convert = observer.wrap(Stage.PREPARE, self._converted, Lane.PREFETCH)
        self._pad = observer.wrap(Stage.PREPARE, buckets.pad, Lane.PREFETCH)
        self._keep = observer.wrap(Stage.PIN if pins else Stage.PREPARE, self._kept, Lane.PREFETCH)

    def __call__(self, work: Work, *, converts: bool = True, owns: bool = True) -> None:
        """Make a batch ready for the device.

        Args:
            work: Its batch is replaced, and its lengths are set.
            converts: Whether it is still as the user made it.
            owns: Whether somebody may write to its memory.
        """
        with self._lock:
            self._observer.at(work.index, Lane.PREFETCH)
            batch = self._convert(work.batch) if converts else work.batch
            batch, work.lengths = self._pad(batch)
            work.batch = self._keep(batch, owns)

    def convert(self, batch: Any, index: int, *, owns: bool) -> Any:
        """A batch that is not padded yet, for who looks at several of them first.

        Args:
            batch: As the user made it.
            index: Its index.
            owns: As above.
        """
        with self._lock:
            self._observer.at(index, Lane.PREFETCH)
            batch = self._convert(batch)
            return owned(batch) if owns else batch

    def _converted(self, batch: Any) -> Any:
        batch = as_tensors(batch)
        return batch if self._hook is None else self._hook(batch)

    def _kept(self, batch: Any, owns: bool) -> Any:
        if self._pins:
            return pin(batch, owns=owns)
        return owned(batch) if owns else batch
