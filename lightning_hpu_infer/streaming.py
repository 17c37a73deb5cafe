"""Predictions one by one, while the Trainer goes on with the next ones."""

import contextvars
import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_hpu_infer._lightning import starts_processes
from lightning_hpu_infer.ahead import has_modes
from lightning_hpu_infer.transfer import host_copy

_PATIENCE = 2.0
"""Seconds after which a run that is to end is waited for with words."""


def stream(
    trainer: Trainer,
    model: LightningModule | None = None,
    dataloaders: Any = None,
    *,
    max_pending: int = 4,
    **options: Any,
) -> Iterator[Any]:
    """Predict, and yield each batch's prediction as soon as it is there, in stock Lightning's order.

    `trainer.predict` runs in a thread, which alone uses the device. It stops when `max_pending` predictions wait for
    the caller, so memory stays bounded. Leaving the loop (`break`, an error, Ctrl-C) ends the run: batches under way
    are dropped, callbacks have their `on_exception`, and the same Trainer predicts again.

    Args:
        trainer: Any Trainer, with this package's accelerator or another one.
        model: As for `trainer.predict`.
        dataloaders: As for `trainer.predict`.
        max_pending: Predictions that may wait for the caller.
        **options: Others of `trainer.predict`: `datamodule`, `ckpt_path`.

    Returns:
        An iterator over what `predict_step`, or `postprocess`, returned for each batch, with host tensors that nobody
        else has. They are as the last callback sees them. The run begins with the first.

    Raises:
        MisconfigurationException: If the Trainer starts other processes, in which the predictions would be, or makes
            batches in order of length.
        RuntimeError: If `torch.autocast` or a default device is on, which the thread would not have.
        ValueError: If `max_pending` is not positive.

    What the run raises comes out of the iterator, after the predictions before it.
    """
    if max_pending < 1:
        raise ValueError(f"`max_pending` must be positive, got {max_pending}.")
    if starts_processes(trainer.strategy):
        raise MisconfigurationException(
            f"`stream` needs a run in this process, and {type(trainer.strategy).__name__} starts others. Pass"
            " `devices=1`, or write predictions by `PredictionWriter`."
        )
    if getattr(getattr(trainer.accelerator, "config", None), "group_by_length", None) is not None:
        raise MisconfigurationException(
            "With `group_by_length` the order of the dataset is known only at the end of a run. Pass"
            " `group_by_length=None`, or use `trainer.predict`."
        )
    if has_modes():
        raise RuntimeError(
            "`torch.autocast` or `torch.set_default_device` is on, which the thread of `stream` would not have. Pass"
            " `precision` to the Trainer, or use `trainer.predict`."
        )
    return _stream(
        trainer, partial(trainer.predict, model, dataloaders, return_predictions=False, **options), max_pending
    )


def _stream(trainer: Any, predict: Any, max_pending: int) -> Iterator[Any]:
    handover = _Handover(max_pending)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            predict()
        except BaseException as error:
            errors.append(error)
        finally:
            handover.end()

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="hpu-infer-stream", daemon=True)
    deliver = _Deliver(handover)
    trainer.callbacks.append(deliver)
    try:
        thread.start()
        yield from handover
        thread.join()
    finally:
        handover.stop()
        try:
            _wait_for(thread)
        finally:  # also after a second Ctrl-C
            trainer.callbacks.remove(deliver)
    for error in errors:
        raise error


def _wait_for(thread: threading.Thread) -> None:
    thread.join(_PATIENCE)
    if thread.is_alive():
        rank_zero_warn(
            "The run of `stream` is to end, and its dataset, step or a hook has not returned yet. It is waited for;"
            " Ctrl-C leaves it behind."
        )
        thread.join()


class _Stopped(Exception):
    """The caller of `stream` wants no more predictions."""


class _Handover:
    """Predictions on their way from the run's thread to the caller's, a bounded number of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[Any] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False

    def put(self, prediction: Any) -> None:
        """Wait for room, and hand over.

        Raises:
            _Stopped: If no more are wanted.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._most)
            if self._stopped:
                raise _Stopped("The loop over `stream` was left, so its run ends.")
            self._waiting.append(prediction)
            self._changed.notify_all()

    def end(self) -> None:
        """No more will come."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def stop(self) -> None:
        """No more are wanted."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._waiting)
                if not self._waiting:
                    return
                prediction = self._waiting.popleft()
                self._changed.notify_all()
            yield prediction
            del prediction


class _Deliver(BasePredictionWriter):
    """Hands over each prediction. The last of the callbacks."""

    def __init__(self, handover: _Handover) -> None:
        super().__init__("batch")
        self._handover = handover

    @override
    def write_on_batch_end(self, trainer: Any, pl_module: Any, prediction: Any, *_: Any) -> None:
        # A copy, since the next step runs while the caller uses it.
        self._handover.put(host_copy(prediction))
