"""The steps, outputs and module hooks that programs are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from lightning_hpu_infer.nested import map_tensors, tensors_in
from lightning_hpu_infer.transfer import to_host
from tests.fuzz.data import content
from tests.fuzz.listeners import CHANGES, Fault, Log
from tests.fuzz.networks import Features, Network
from tests.parity.recorder import host

# Steps: (module, input, batch_idx) -> (rows, 3) or as many columns as the network gives


def _net(module: Module, x: Tensor) -> Tensor:
    y = module.net(x)
    if isinstance(y, dict):
        y = y["y"] + y["other"]
    if isinstance(module.net.body, Features) and not module.net.use_spare:
        y = y + module.net.body.saved["h"]
    return y


def _in_place(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    return _net(module, x.mul_(2))


def _item(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    y = _net(module, x)
    return y / (1 + abs(y.sum().item()))


def _autograd(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        energy = functional.softplus(_net(module, x)).sum()
        return torch.autograd.grad(energy, x)[0].detach()


def _catches(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    y = _net(module, x)
    try:
        return y + y[:, 17]
    except IndexError:
        return y * 2


def _keeps(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    y = _net(module, x)
    if module.last is not None and module.last.shape == y.shape:
        y = y + module.last
    module.last = y * 0.5
    return y


def _counts(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    module.steps += 1
    return _net(module, x) * module.steps


def _autocast(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    with torch.autocast(module.device.type, torch.bfloat16):
        return _net(module, x).float()


def _swaps(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    """Averaged weights take the place of the weights for every other step."""
    last = module.net.spare
    module.net.use_spare = True
    own = last.weight
    last.weight = nn.Parameter(own.detach() * (2 if batch_idx % 2 else 1), requires_grad=False)
    try:
        return _net(module, x)
    finally:
        last.weight, module.net.use_spare = own, False


def _picks(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    """As many rows as the data say, and at least one."""
    y = _net(module, x)
    return torch.cat([y[:1], y[x[:, 0] > 0]])


def _progress(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    progress: Any = module.trainer.predict_loop.batch_progress
    return _net(module, x) * progress.current.ready + progress.total.started + progress.is_last_batch


def _adapters(module: Module, x: Tensor, batch_idx: int) -> Tensor:
    module.net.use_spare = batch_idx % 3 == 2
    return _net(module, x)


STEPS: dict[str, Callable[[Module, Tensor, int], Tensor]] = {
    "plain": lambda module, x, batch_idx: _net(module, x),
    "around": lambda module, x, batch_idx: (_net(module, x - 0.5) * 2).softmax(-1),
    "twice": lambda module, x, batch_idx: _net(module, x) + _net(module, x * 2),
    "by_row": lambda module, x, batch_idx: torch.cat([_net(module, row[None]) for row in x]),
    "no_network": lambda module, x, batch_idx: x * 2,
    "batch_idx": lambda module, x, batch_idx: _net(module, x) * (batch_idx + 1),
    "odd": lambda module, x, batch_idx: _net(module, x) if batch_idx % 2 else x + 1,
    "in_place": _in_place,
    "item": _item,
    "autograd": _autograd,
    "catches": _catches,
    "keeps": _keeps,
    "counts": _counts,
    "autocast": _autocast,
    "swaps": _swaps,
    "picks": _picks,
    "progress": _progress,
    "adapters": _adapters,
    "forward": lambda module, x, batch_idx: module(x),
}


class Scores(NamedTuple):
    y: Tensor
    number: int


@dataclass
class Result:
    y: Tensor
    number: int


class Plain:
    """An object that nobody knows."""

    def __init__(self, y: Tensor) -> None:
        self.y = y.cpu()


def _own_buffer(module: Module, y: Tensor, x: Tensor, batch_idx: int) -> Tensor:
    if module.buffer is None or module.buffer.shape != y.shape:
        module.buffer = torch.zeros_like(y)
    return module.buffer.copy_(y)


def _own_dict(module: Module, y: Tensor, x: Tensor, batch_idx: int) -> dict[str, Any]:
    module.box["y"] = y
    module.box[f"batch {batch_idx % 2}"] = batch_idx
    return module.box


# Outputs: (module, what the step computed, its input, batch_idx) -> what it returns; names with an x return the input
OUTPUTS: dict[str, Callable[[Module, Tensor, Tensor, int], Any]] = {
    "tensor": lambda module, y, x, batch_idx: y,
    "dict": lambda module, y, x, batch_idx: {"y": y, "number": batch_idx, "text": "abc", "none": None},
    "list": lambda module, y, x, batch_idx: [y, y + 1],
    "tuple": lambda module, y, x, batch_idx: (y, [y.sum(), (y[0],)]),
    "named": lambda module, y, x, batch_idx: Scores(y, batch_idx),
    "dataclass": lambda module, y, x, batch_idx: Result(y, batch_idx),
    "object": lambda module, y, x, batch_idx: Plain(y),
    "none": lambda module, y, x, batch_idx: None,
    "some": lambda module, y, x, batch_idx: y if batch_idx % 2 else None,
    "number": lambda module, y, x, batch_idx: float(y.sum()),
    "numbers": lambda module, y, x, batch_idx: y.tolist(),
    "index": lambda module, y, x, batch_idx: batch_idx,
    "numpy": lambda module, y, x, batch_idx: y.cpu().numpy(),
    "argmax": lambda module, y, x, batch_idx: y.argmax(-1),
    "mask": lambda module, y, x, batch_idx: y > 0,
    "double": lambda module, y, x, batch_idx: y.double(),
    "rows": lambda module, y, x, batch_idx: list(y),
    "view": lambda module, y, x, batch_idx: y[:, 1:].T,
    "empty": lambda module, y, x, batch_idx: y[:0],
    "scalar": lambda module, y, x, batch_idx: y.mean(),
    "same": lambda module, y, x, batch_idx: [y, y],
    "host": lambda module, y, x, batch_idx: {"y": y, "cpu": torch.full((2,), batch_idx)},
    "x": lambda module, y, x, batch_idx: {"y": y, "x": x},
    "own_buffer": _own_buffer,
    "own_dict": _own_dict,
}


class Module(LightningModule):
    """Runs the choices of a program."""

    net: Any

    def __init__(self, choices: Any, log: Log, fault: Fault) -> None:
        super().__init__()
        self.net = Network(choices.network, fault if fault.stage == "network" else None)
        self.step_of, self.output_of = STEPS[choices.step], OUTPUTS[choices.output]
        self.change = CHANGES[choices.change] if choices.when == "step" else None
        self.postprocess = POSTPROCESSES[choices.postprocess]
        self.change_at, self.training_mode = choices.at, choices.training
        self.steps, self.box = 0, dict[str, Any]()
        self.last: Tensor | None = None
        self.buffer: Tensor | None = None
        self.log_of_run, self.fault = log, fault
        self.fails = fault.stage == "step"

    def on_predict_start(self) -> None:
        if self.training_mode:
            self.net.train()

    def forward(self, x: Tensor) -> Tensor:
        return _net(self, x) + 1

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if self.fails:
            self.fault.pass_by("step")
        if self.change is not None and batch_idx == self.change_at:
            self.change(self)
        x = content(batch, self.device)
        return self.output_of(self, self.step_of(self, x, batch_idx), x, batch_idx)


class Records(Module):
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log_of_run.note("module", "end", dataloader_idx, batch_idx, host(outputs), host(batch), self.steps)


class AddsToWeights(Module):
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        with torch.no_grad():
            self.net.body.last.bias.add_(0.5)


class Factor(Module):
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.net.factor += 0.25


class ReadsState(Module):
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log_of_run.note("module", "end", batch_idx, self.steps, self.net.factor, host(dict(self.state_dict())))


class WritesOutputs(Module):
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if isinstance(outputs, dict):
            outputs["y"] = outputs["y"].cpu() * 3
        elif isinstance(outputs, Tensor) and outputs.is_floating_point():
            outputs.add_(1)
        elif isinstance(outputs, list) and outputs and isinstance(outputs[0], Tensor):
            outputs.append(outputs.pop(0) * 2)


class WritesBatch(Module):
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x = batch if isinstance(batch, Tensor) else content(batch, self.device)
        x.mul_(batch_idx + 1)


class FactorByBatch(Module):
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.net.factor = 1.0 + batch_idx % 3


class Transfers(Module):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": content(batch, torch.device("cpu")) + 1}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": batch["x"] * 2}


HOOKS: dict[str, type[Module]] = {
    "none": Module,
    "end_records": Records,
    "end_weights": AddsToWeights,
    "end_factor": Factor,
    "end_state": ReadsState,
    "end_outputs": WritesOutputs,
    "start_batch": WritesBatch,
    "start_factor": FactorByBatch,
    "transfers": Transfers,
}


def _scaled(output: Any) -> Any:
    return {"scaled": map_tensors(lambda tensor: tensor * 2, output, copies=True)}


def _summed(output: Any) -> list[Any]:
    return [type(output).__name__, *(float(tensor.double().sum()) for tensor in tensors_in(output))]


def _fails(output: Any) -> Any:
    """Raises for the batches of a few rows."""
    if any(tensor.dim() and len(tensor) == 1 for tensor in tensors_in(output)):
        raise ValueError("too few rows")
    return output


# Post-processing: the step calls it in stock Lightning, the plugin as `postprocess`. Gets host tensors.
POSTPROCESSES: dict[str, Callable[[Any], Any] | None] = {
    "none": None,
    "scaled": _scaled,
    "summed": _summed,
    "same": lambda output: output,
    "fails": _fails,
}


class Postprocessed(Module):
    """Its step does what `postprocess` does."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        assert self.postprocess is not None
        return self.postprocess(to_host(super().predict_step(batch, batch_idx, dataloader_idx)))


class Before(Module):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.fault.pass_by("before")
        return super().on_before_batch_transfer(batch, dataloader_idx)


class After(Module):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.fault.pass_by("after")
        return super().on_after_batch_transfer(batch, dataloader_idx)


def make_module(choices: Any, log: Log, fault: Fault, *, postprocesses: bool) -> Module:
    """The module of a program; `postprocesses` if its step does the post-processing."""
    bases: list[type[Module]] = []
    if postprocesses and choices.postprocess != "none":
        bases.append(Postprocessed)
    if fault.stage in ("before", "after"):
        bases.append(Before if fault.stage == "before" else After)
    if choices.hook != "none" or not bases:
        bases.append(HOOKS[choices.hook])
    return type("Fuzzed", tuple(bases), {})(choices, log, fault)
