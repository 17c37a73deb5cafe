"""Who listens to a run: callbacks that act, callbacks and writers that record, faults, and changes in a run."""

import builtins
import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor, nn

from tests.parity.recorder import host


class Log:
    """What hooks saw, in order: (listener, hook, ...)."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def note(self, *event: Any) -> None:
        self.events.append(event)


class Fault:
    """Raises in one stage at the n-th time that the stage is passed, once."""

    def __init__(self, stage: str, at: int, error: str) -> None:
        self.stage, self.at, self.error = stage, at, getattr(builtins, error)

    def pass_by(self, stage: str) -> None:
        if stage == self.stage:
            self.at -= 1
            if self.at == 0:
                raise self.error(f"in {stage}")


# Changes of a module in a run


def _in_place(module: Any) -> None:
    with torch.no_grad():
        module.net.body.last.weight.mul_(2)


def _mode(module: Any) -> None:
    module.net.train(not module.net.training)


def _loaded(module: Any) -> None:
    module.net.load_state_dict({name: value * 2 for name, value in module.net.state_dict().items()})


def _submodule(module: Any) -> None:
    torch.manual_seed(5)
    module.net.body.last = nn.Linear(8, 3).to(module.device)


CHANGES: dict[str, Callable[[Any], object] | None] = {
    "none": None,
    "weight in place": _in_place,
    "weight data in place": lambda module: module.net.body.last.weight.data.add_(0.5),
    "weight data replaced": lambda module: setattr(
        module.net.body.last.weight, "data", module.net.body.last.weight.data * 2
    ),
    "weight replaced": lambda module: setattr(
        module.net.body.last, "weight", nn.Parameter(module.net.body.last.weight.detach() * 2)
    ),
    "number": lambda module: setattr(module.net, "factor", module.net.factor + 1),
    "branch": lambda module: setattr(module.net, "use_spare", not module.net.use_spare),
    "buffer in place": lambda module: module.net.offset.add_(1),
    "buffer replaced": lambda module: setattr(module.net, "offset", module.net.offset + 1),
    "loaded": _loaded,
    "submodule": _submodule,
    "bias removed": lambda module: setattr(module.net.body.last, "bias", None),
    "mode": _mode,
    "forward hook": lambda module: module.net.body.last.register_forward_hook(lambda _, args, output: output * 2),
    "forward pre-hook": lambda module: module.net.body.last.register_forward_pre_hook(lambda _, args: args[0] * 2),
    "forward": lambda module: setattr(module.net.body.last, "forward", lambda h: h[:, :3] * 2),
    "network": lambda module: setattr(module, "net", copy.deepcopy(module.net)),
}


# Callbacks that act


class Acts(Callback):
    """Does something at the start or the end of a batch of the first loader."""

    def __init__(self, at: int, log: Log) -> None:
        self.at, self.seen = at, log


class Late(Callback):
    def __init__(self, log: Log) -> None:
        self.seen = log

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self.seen.note("late", "end", batch_idx)


class StartActs(Acts):
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == self.at and not dataloader_idx:
            self.act(trainer, pl_module)

    def act(self, trainer: Any, module: Any) -> None:
        raise NotImplementedError


class EndActs(Acts):
    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *rest: Any
    ) -> None:
        if batch_idx == self.at and not any(rest):
            self.act(trainer, pl_module)

    def act(self, trainer: Any, module: Any) -> None:
        raise NotImplementedError


class AddsCallback(StartActs):
    def act(self, trainer: Any, module: Any) -> None:
        trainer.callbacks.append(Late(self.seen))


class RemovesCallback(StartActs):
    def act(self, trainer: Any, module: Any) -> None:
        trainer.callbacks.remove(self)


class ClearsPredictions(EndActs):
    def act(self, trainer: Any, module: Any) -> None:
        loop = trainer.predict_loop
        self.seen.note("clears", "end", [len(each) for each in loop._predictions])
        loop._predictions = [[] for _ in range(loop.num_dataloaders)]


class ReadsProgress(EndActs):
    def act(self, trainer: Any, module: Any) -> None:
        loop = trainer.predict_loop
        self.seen.note("progress", "end", loop.batch_progress.state_dict())


BRIDGE_NAMES = ("custom_name", "names_hook")
"""Attributes that the bridge gives to modules in lazy mode."""


def names_in(part: nn.Module) -> list[str]:
    """The names of all attributes of a module."""
    return sorted(name for name in vars(part) if name not in BRIDGE_NAMES)


class Keeps(Callback):
    """Keeps all outputs and batches, and reads them when the run is over."""

    def __init__(self, at: int, log: Log) -> None:
        self.seen, self.kept = log, list[Any]()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self.kept.append((outputs, batch))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.note("keeps", "epoch", host(self.kept), host(trainer.predict_loop.predictions))


class Copies(StartActs):
    """Copies and saves the module in a run."""

    def act(self, trainer: Any, module: Any) -> None:
        copied = copy.deepcopy(module.net)
        torch.save(module.net.state_dict(), file := io.BytesIO())
        file.seek(0)
        loaded = torch.load(file, map_location="cpu")
        self.seen.note("copies", "start", host(dict(copied.state_dict())), host(dict(loaded)), names_in(copied))


class ReplacesStep(StartActs):
    def act(self, trainer: Any, module: Any) -> None:
        step = module.predict_step

        def twice(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            return output * 2 if isinstance(output, Tensor) and output.is_floating_point() else output

        module.predict_step = twice


CALLBACKS: dict[str, Callable[[int, Log], Callback] | None] = {
    "none": None,
    "adds callback": AddsCallback,
    "removes callback": RemovesCallback,
    "clears predictions": ClearsPredictions,
    "reads progress": ReadsProgress,
    "keeps": Keeps,
    "copies": Copies,
    "replaces step": ReplacesStep,
}


class Change(Callback):
    """Makes a change at the start or at the end of a batch, of each loader."""

    def __init__(self, change: Callable[[Any], object], when: str, at: int) -> None:
        self.change, self.at = change, at
        # Only the hook that is needed: an end hook has an effect on the order of a run by being there.
        setattr(self, f"on_predict_batch_{when}", self._at_start if when == "start" else self._at_end)

    def _at_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == self.at:
            self.change(module)

    def _at_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self._at_start(trainer, module, batch, batch_idx)


class FaultyHook(Callback):
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        stage = fault.stage
        setattr(self, stage if stage.startswith("on_") else f"on_predict_batch_{stage}", self._pass_by)

    def _pass_by(self, *_: Any) -> None:
        self.fault.pass_by(self.fault.stage)


# Recorders


def _loop_state(trainer: Any) -> tuple[Any, ...]:
    loop = trainer.predict_loop
    progress = loop.batch_progress
    counters = [(each.ready, each.started, each.processed) for each in (progress.current, progress.total)]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), trainer.lightning_module._current_fx_name
    return progress.is_last_batch, list(loop.current_batch_indices), *counters, *modes


class Watch(Callback):
    """Records the hooks of a batch."""

    def __init__(self, log: Log, with_state: bool) -> None:
        self.seen, self.with_state = log, with_state

    def _state(self, trainer: Trainer, module: LightningModule) -> Any:
        return (_loop_state(trainer), host(dict(module.state_dict())) if self.with_state else None)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.note("watch", "start", dataloader_idx, batch_idx, host(batch), self._state(trainer, pl_module))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        state = self._state(trainer, pl_module)
        self.seen.note("watch", "end", dataloader_idx, batch_idx, host(batch), host(outputs), state)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.note("watch", "epoch", host(trainer.predict_loop.predictions), host(dict(pl_module.state_dict())))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.seen.note("watch", "exception", type(exception).__name__)


class Writer(BasePredictionWriter):
    """Records what a writer gets."""

    def __init__(self, log: Log, fault: Fault, interval: Any) -> None:
        super().__init__(interval)
        self.seen, self.fault = log, fault

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.fault.pass_by("writer")
        indices = list(batch_indices or [])
        self.seen.note("writer", "batch", dataloader_idx, batch_idx, indices, host(prediction), host(batch))

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any
    ) -> None:
        self.fault.pass_by("epoch_writer")
        self.seen.note("writer", "epoch", host(predictions), [list(indices) for indices in batch_indices])


def make_callbacks(choices: Any, log: Log, fault: Fault) -> list[Callback]:
    """The callbacks of a program."""
    callbacks: list[Callback] = []
    acts, change = CALLBACKS[choices.callback], CHANGES[choices.change]
    if acts is not None:
        callbacks.append(acts(choices.at, log))
    if change is not None and choices.when != "step":
        callbacks.append(Change(change, choices.when, choices.at))
    if fault.stage in ("start", "end") or fault.stage.startswith("on_"):
        callbacks.append(FaultyHook(fault))
    if choices.watch == "writer":
        callbacks.append(Writer(log, fault, choices.interval))
    elif choices.watch != "none":
        callbacks.append(Watch(log, choices.watch == "state"))
    return callbacks
