"""Changes that users make between two batches: predictions are those that the device gives without graphs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_hpu_infer.verify.ask import host
from lightning_hpu_infer.verify.check import Broken, Check, Kind, Seen
from lightning_hpu_infer.verify.compare import DEVICE_TOLERANCES, distance
from lightning_hpu_infer.verify.predict import ALL_OFF, Run, check_graphs, insisting, predict

_BEFORE = 5
_BATCHES = 9
_WIDTH = 16
_OPTIONS = {"factor": 1.0}


class _Module(LightningModule):
    """Uses all that is changed below."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)
            self.norm, self.drop = nn.BatchNorm1d(_WIDTH), nn.Dropout(1.0)
        self.register_buffer("offset", torch.zeros(_WIDTH))
        self.factor, self.autocast = 1.0, False
        self.function: Callable[[Tensor], Tensor] = torch.tanh

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        x = batch.float()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            x = self.second(self.function(self.first(x) + self.offset))
        return self.drop(self.norm(x.float())) * self.factor * _OPTIONS["factor"]


def _replaced(module: Any) -> nn.Parameter:
    return nn.Parameter(module.second.weight.detach() * 2, requires_grad=False)


def _in_place(module: Any) -> None:
    with torch.no_grad():
        module.second.weight.mul_(2)


def _restore_global() -> None:
    _OPTIONS["factor"] = 1.0


def _global(module: Any) -> Callable[[], object]:
    _OPTIONS["factor"] = 3.0
    return _restore_global


def _loaded(module: Any) -> None:
    module.load_state_dict({name: tensor * 2 for name, tensor in module.state_dict().items()})


CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight in place": _in_place,
    "a weight replaced": lambda module: setattr(module.second, "weight", _replaced(module)),
    "the memory of a weight replaced": lambda module: setattr(
        module.second.weight, "data", module.second.weight.data * 2
    ),
    "a buffer in place": lambda module: module.offset.add_(1.0),
    "a buffer replaced": lambda module: setattr(module, "offset", torch.ones(_WIDTH).to(module.device)),
    "the statistics of a norm": lambda module: module.norm.running_mean.add_(1.0),
    "a state dict loaded": _loaded,
    "a submodule replaced": lambda module: setattr(module, "second", module.first),
    "a number": lambda module: setattr(module, "factor", 3.0),
    "a function": lambda module: setattr(module, "function", torch.sin),
    "a closure": lambda module: setattr(module, "function", lambda x, shift=module.offset + 2: x + shift),
    "a global value": _global,
    "a forward hook": lambda module: module.second.register_forward_hook(lambda _, inputs, output: output * 3).remove,
    "a part in train mode": lambda module: module.drop.train() and None,
    "autocast": lambda module: setattr(module, "autocast", True),
}
"""What is changed before a batch, by name; a function that is returned undoes it."""
# Of the batches, from the changed one on.
BATCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "a batch of another size": lambda batch: batch[:3],
    "a batch of another dtype": lambda batch: batch.to(torch.bfloat16),
    "a batch that is a view": lambda batch: batch.t().contiguous().t(),
}
QUICK = ("a weight in place", "a weight replaced", "a number", "a batch of another size")


class _Change(Callback):
    """Makes a change before one batch, and undoes it at the end."""

    def __init__(self, change: Callable[[Any], object]) -> None:
        self._change = change
        self.undo: object = None

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == _BEFORE:
            self.undo = self._change(pl_module)


def checks(*, quick: bool) -> Iterator[Check]:
    """A check per change.

    Args:
        quick: Only four of them.
    """
    for name in QUICK if quick else (*CHANGES, *BATCHES):
        yield Check(kind=Kind.CHANGE, name=name, run=partial(_compared, name), turns_off="Set `hpu_graphs=False`.")


def _compared(name: str) -> Seen:
    expected = _predict(name, ALL_OFF).predictions
    unchanged = predict(ALL_OFF, _Module().eval(), _batches()).predictions
    if name in CHANGES and all(map(torch.equal, expected, unchanged)):
        raise Broken("the change has no effect with all techniques off: this check is of no use")
    run = _predict(name, {"hpu_graphs": insisting(), "verify_graphs": 0})
    away = distance(run.predictions, expected, DEVICE_TOLERANCES, "those without graphs,")
    return Seen(f"{away}; {check_graphs(run)}", {"equal": away.equal, "largest_difference": away.largest})


def _batches() -> list[Tensor]:
    return [host(4, _WIDTH, seed=number) for number in range(_BATCHES)]


def _predict(name: str, flags: dict[str, Any]) -> Run:
    change, batches = _Change(CHANGES.get(name, lambda module: None)), _batches()
    if name in BATCHES:
        batches = [batch if number < _BEFORE else BATCHES[name](batch) for number, batch in enumerate(batches)]
    try:
        return predict(flags, _Module().eval(), batches, callbacks=[change])
    finally:
        if callable(change.undo):
            change.undo()
