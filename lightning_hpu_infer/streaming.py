"""Predictions one by one, while the Trainer goes on with the next ones."""

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
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
_RUNS = ("fit", "validate", "test", "predict")
"""What runs a Trainer."""


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
    are dropped, callbacks have their `on_exception`, and the same Trainer predicts again. Until then the Trainer and
    the module belong to the stream: both can be in one run only.

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
        RuntimeError: If `torch.autocast` or a default device is on, which the thread would not have, here or at the
            first prediction. From the iterator, if the Trainer or the module is in another stream; or once another
            Trainer has run the module.
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
    _refuse_modes(trainer)
    return _stream(trainer, (model, dataloaders), {"return_predictions": False, **options}, max_pending)


def _stream(trainer: Any, args: tuple[Any, Any], options: dict[str, Any], max_pending: int) -> Iterator[Any]:
    _refuse_modes(trainer)  # The run begins here, with the first `next`.
    handover = _Handover(max_pending)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with _reserved(trainer, args[0], _Deliver(handover)) as predict:
                predict(*args, **options)
                handover.end(wait=True)
        except BaseException as error:
            errors.append(error)
        finally:
            handover.end()

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="hpu-infer-stream", daemon=True)
    try:
        thread.start()
        yield from handover
    finally:
        handover.stop()
        _wait_for(thread)
    for error in errors:
        raise error


def _refuse_modes(trainer: Any) -> None:
    if has_modes() or torch.is_autocast_enabled(trainer.strategy.root_device.type):
        raise RuntimeError(
            "`torch.autocast` or `torch.set_default_device` is on, which the thread of `stream` would not have. Pass"
            " `precision` to the Trainer, or use `trainer.predict`."
        )


@contextmanager
def _reserved(trainer: Any, model: Any, deliver: "_Deliver") -> Iterator[Callable[..., Any]]:
    """Give a Trainer's `predict`, let it deliver, and refuse all other runs meanwhile.

    They are refused before they begin. When a run calls the first hook, it has changed the Trainer's module,
    dataloaders and strategy already, and if that raises, it tears them down.
    """
    others = (trainer, getattr(trainer.lightning_module if model is None else model, "_trainer", None))
    if any(isinstance(callback, _Deliver) for other in others if other is not None for callback in other.callbacks):
        _refuse()
    predict, attributes = trainer.predict, vars(trainer)
    before = {name: attributes[name] for name in _RUNS if name in attributes}
    trainer.callbacks.append(deliver)
    attributes.update(dict.fromkeys(_RUNS, _refuse))
    try:
        yield predict
    finally:
        for name in _RUNS:
            del attributes[name]
        attributes.update(before)
        trainer.callbacks.remove(deliver)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "This Trainer, or its module, is in a `stream` that has not ended. End that loop first (`close()` ends an"
        " iterator that is kept), or use another Trainer with another copy of the module. A copy of the Trainer"
        " that was made in the loop stays refused: make it before."
    )


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

    def end(self, *, wait: bool = False) -> None:
        """No more will come.

        Args:
            wait: Whether to wait until the caller has left the loop.
        """
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or not wait)

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
        if pl_module.trainer.strategy is not trainer.strategy:
            raise RuntimeError(
                "Another Trainer has run the module of a `stream` that has not ended, which changes its mode, device or"
                " weights. Give that Trainer a copy, made before the loop."
            )
        # A copy, since the next step runs while the caller uses it.
        self._handover.put(host_copy(prediction))
