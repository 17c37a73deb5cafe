"""The law of graphs: whatever changes behind a captured graph, predictions equal stock Lightning's.

Each change happens before batch 6, between two dataloaders, or between two runs, in lazy and in eager mode.
"""

import copy
import functools
import io
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.helpers import assert_equal, installed, predict, rows, trainer

BEFORE = 6
BATCHES = 12


class Scale:
    """A plain object that a network uses."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def of(self, x: Tensor) -> Tensor:
        return x * self.factor


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Network(nn.Module):
    """Uses all that the changes below change, each without effect at first."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(1.0)
        self.adapters = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.register_buffer("offset", torch.zeros(4))
        self.active, self.factor, self.repeats, self.use_spare = "a", 1.0, 1, False
        self.options: dict[str, Any] = {"factor": 1.0, "nested": {"factors": [1.0, 1.0]}}
        self.config = types.SimpleNamespace(factor=1.0, act="relu")
        self.scale, self.partial = Scale(1.0), functools.partial(torch.mul, other=1.0)
        self.tensors: list[Tensor] = []
        self.table: Any = None
        self.host = torch.tensor(1.0)
        self.array = np.ones(4, dtype="float32")
        self.function: Callable[[Tensor], Tensor] = torch.tanh
        self.dtype: Any = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        x = self.adapters[self.active](self.first(x)) + self.offset
        for block in self.blocks[: self.repeats]:
            x = block(x)
        x = self.scale.of(self.partial(x)) * self.factor * self.options["factor"] * self.options["nested"]["factors"][1]
        x = self.function(x * self.config.factor)
        x = torch.relu(x) if self.config.act == "relu" else torch.sigmoid(x)
        x = self.drop(self.norm(self.second(x)))
        if self.tensors:
            x = x + self.tensors[0]
        if self.table is not None:
            x = x * self.table
        if self.use_spare:
            x = self.spare(x)
        return self.cast(x * self.host)

    def cast(self, x: Tensor) -> Tensor:
        return (x.to(self.dtype).float() * GLOBAL["factor"]) + torch.from_numpy(self.array).to(x.device)


GLOBAL = {"factor": 1.0}


class Module(LightningModule):
    """Its step has something around the network."""

    net: Any

    def __init__(self) -> None:
        super().__init__()
        self.net = Network()
        self.temperature = 1.0
        self.context: Any = None

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if self.context is not None:
            with self.context():
                return (self.net(batch) / self.temperature).softmax(-1)
        return (self.net(batch) / self.temperature).softmax(-1)


Change = Callable[[Any], object]
"""Changes a module; a cleanup that it returns is called after the run."""
CHANGES: dict[str, Change] = {}


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


def on(module: Module, value: Any) -> Tensor:
    """A tensor where the module is."""
    return torch.as_tensor(value).to(module.device)


def sets(**values: Any) -> Change:
    """Sets attributes of the network."""

    def change(module: Any) -> None:
        for name, value in values.items():
            setattr(module.net, name, value)

    return change


CHANGES |= {
    "a string attribute": sets(active="b"),
    "a float attribute": sets(factor=3.0),
    "an int attribute": sets(repeats=2),
    "a bool attribute": sets(use_spare=True),
    "a dtype attribute": sets(dtype=torch.bfloat16),
    "a function attribute": sets(function=torch.sin),
    "a plain object": sets(scale=Scale(3.0)),
    "a partial": sets(partial=functools.partial(torch.mul, other=3.0)),
    "an attribute of the step": lambda module: setattr(module, "temperature", 3.0),
    "an attribute of a plain object": lambda module: setattr(module.net.scale, "factor", 3.0),
    "a value in a dict": lambda module: module.net.options.update(factor=3.0),
    "a value in nested containers": lambda module: module.net.options["nested"]["factors"].__setitem__(1, 3.0),
    "a value of a config object": lambda module: setattr(module.net.config, "factor", 3.0),
    "a branch by a config object": lambda module: setattr(module.net.config, "act", "sigmoid"),
    "a method of an object": lambda module: setattr(module.net.scale, "of", lambda x: x * 3),
    "a method of the network": lambda module: setattr(module.net, "cast", lambda x: x * 3),
    "the forward of a part": lambda module: setattr(module.net.second, "forward", lambda x: x * 3),
    "a tensor in a list": lambda module: module.net.tensors.append(on(module, [1.0, 2.0, 3.0, 4.0])),
    "None becomes a tensor": lambda module: setattr(module.net, "table", on(module, [1.0, 2.0, 3.0, 4.0])),
    "a host tensor in place": lambda module: module.net.host.fill_(3.0),
    "a host tensor replaced": sets(host=torch.tensor(3.0)),
    "a NumPy array in place": lambda module: module.net.array.fill(3.0),
    "a NumPy array replaced": sets(array=np.full(4, 3.0, dtype="float32")),
    "a buffer replaced": lambda module: setattr(module.net, "offset", on(module, [1.0, 2.0, 3.0, 4.0])),
    "a buffer in place": lambda module: module.net.offset.add_(1.0),
    "a buffer registered again": lambda module: module.net.register_buffer("offset", on(module, [1.0, 2.0, 3.0, 4.0])),
    "the statistics of a norm": lambda module: module.net.norm.running_mean.add_(1.0),
    "a part in train mode": lambda module: module.net.drop.train() and None,
    "a part without running statistics": lambda module: setattr(module.net.norm, "track_running_stats", False),
    "a submodule replaced": lambda module: setattr(module.net, "second", nn.Linear(4, 4).to(module.device)),
    "a submodule of another class": lambda module: setattr(module.net, "second", Double()),
    "a submodule in a list": lambda module: module.net.blocks.__setitem__(0, nn.Linear(4, 4).to(module.device)),
    "a submodule appended": lambda module: (module.net.blocks.insert(0, Double()), sets(repeats=3)(module))[1],
    "a submodule in a dict": lambda module: module.net.adapters.update({"a": nn.Linear(4, 4).to(module.device)}),
    "parts exchanged": lambda module: module.net.__dict__["_modules"].update(
        first=module.net.second, second=module.net.first
    ),
    "another network": lambda module: setattr(module, "net", Network().to(module.device).eval()),
    "a bias removed": lambda module: setattr(module.net.second, "bias", None),
}


def scaled(module: Module) -> nn.Parameter:
    return nn.Parameter(module.net.second.weight.detach() * 3, requires_grad=False)


@change
def a_weight_replaced(module: Module) -> None:
    module.net.second.weight = scaled(module)


@change
def a_weight_in_place(module: Module) -> None:
    with torch.no_grad():
        module.net.second.weight.mul_(3)


@change
def the_data_of_a_weight_in_place(module: Module) -> None:
    module.net.second.weight.data.mul_(3)


@change
def the_data_of_a_weight_replaced(module: Module) -> None:
    module.net.second.weight.data = module.net.second.weight.data * 3


@change
def the_data_of_a_weight_added_to(module: Module) -> None:
    module.net.second.weight.data += 1


@change
def the_data_of_a_buffer_replaced(module: Module) -> None:
    module.net.offset.data = on(module, [1.0, 2.0, 3.0, 4.0])


@change
def a_weight_past_setattr(module: Module) -> None:
    module.net.second._parameters["weight"] = scaled(module)


@change
def a_weight_shared_with_another_part(module: Module) -> None:
    module.net.second.weight = module.net.first.weight


@change
def a_state_dict_loaded(module: Module) -> None:
    module.net.load_state_dict({name: tensor * 2 for name, tensor in module.net.state_dict().items()})


@change
def a_state_dict_assigned(module: Module) -> None:
    state = {name: tensor * 2 for name, tensor in module.net.state_dict().items()}
    module.net.load_state_dict(state, assign=True)


@change
def weights_swapped_and_swapped_back(module: Module) -> Callable[[], object]:
    own = module.net.second.weight
    module.net.second.weight = scaled(module)
    return lambda: setattr(module.net.second, "weight", own)


@change
def a_forward_hook(module: Module) -> Callable[[], object]:
    return module.net.second.register_forward_hook(lambda _, inputs, output: output * 3).remove


@change
def a_forward_pre_hook(module: Module) -> Callable[[], object]:
    return module.net.second.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,)).remove


@change
def a_hook_of_the_network(module: Module) -> Callable[[], object]:
    return module.net.register_forward_hook(lambda _, inputs, output: output * 3).remove


@change
def a_global_hook(module: Module) -> Callable[[], object]:
    hook = nn.modules.module.register_module_forward_hook(lambda part, inputs, output: output * 1.5)
    return hook.remove


@change
def a_global_pre_hook(module: Module) -> Callable[[], object]:
    hook = nn.modules.module.register_module_forward_pre_hook(lambda part, inputs: (inputs[0] * 1.5,))  # type: ignore[arg-type]
    return hook.remove


@change
def the_forward_of_a_class(module: Module) -> Callable[[], object]:
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return original(self, x) * 1.5

    nn.Linear.forward = forward  # type: ignore[method-assign,assignment]
    return lambda: setattr(nn.Linear, "forward", original)


@change
def a_class_attribute(module: Module) -> Callable[[], object]:
    Scale.factor = 3.0
    del module.net.scale.factor

    def undo() -> None:
        del Scale.factor  # type: ignore[misc]
        module.net.scale.factor = 1.0

    return undo


@change
def a_global_value(module: Module) -> Callable[[], object]:
    GLOBAL["factor"] = 3.0
    return lambda: GLOBAL.update(factor=1.0)


@change
def a_parametrization(module: Module) -> Callable[[], object]:
    parametrize.register_parametrization(module.net.second, "weight", Double())
    return lambda: parametrize.remove_parametrizations(module.net.second, "weight", leave_parametrized=False) and None


@change
def weight_norm(module: Module) -> None:
    parametrizations.weight_norm(module.net.second)


@change
def autocast_in_the_step(module: Module) -> None:
    kind = module.device.type
    module.context = lambda: torch.autocast(kind, torch.bfloat16)


@change
def gradients_in_the_step(module: Module) -> None:
    module.context = torch.enable_grad


@change
def the_network_copied(module: Module) -> None:
    copied = copy.deepcopy(module.net)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    module.net = copied


@change
def the_network_pickled(module: Module) -> None:
    file = io.BytesIO()
    torch.save(module.net.state_dict(), file)
    file.seek(0)
    module.net.load_state_dict(torch.load(file))


@change
def an_environment_variable(module: Module) -> Callable[[], object]:
    os.environ["LIGHTNING_HPU_INFER_TEST"] = "3"
    module.net.function = lambda x: x * float(os.environ.get("LIGHTNING_HPU_INFER_TEST", "1"))
    return lambda: os.environ.pop("LIGHTNING_HPU_INFER_TEST") and None


@change
def half_precision(module: Module) -> None:
    module.net.spare.to(torch.bfloat16)
    module.net.use_spare, module.net.cast = True, lambda x: x.float()
    module.net.drop.forward = lambda x: x.to(torch.bfloat16)


class Before(Callback):
    """Makes a change before one batch."""

    def __init__(self, make: Change, batch: int = BEFORE, loader: int = 0) -> None:
        self.make, self.batch, self.loader = make, batch, loader
        self.cleanup: Any = None

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if (batch_idx, dataloader_idx) == (self.batch, self.loader):
            torch.manual_seed(7)
            self.cleanup = self.make(pl_module)


@contextmanager
def cleaned_up(callback: Before) -> Iterator[None]:
    try:
        yield
    finally:
        if callable(callback.cleanup):
            callback.cleanup()


def predictions(accelerator: Any, make: Change, loaders: Any, batch: int = BEFORE, loader: int = 0) -> Any:
    callback = Before(make, batch, loader)
    with cleaned_up(callback):
        return predict(accelerator, Module().eval(), loaders, callbacks=[callback])


MODES = pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "eager"])
quiet = pytest.mark.filterwarnings("ignore:.*runs? without")


# Without an emulator, whose moves of modules differ from the CPU's for tensors that were made in inference mode.
@functools.cache
def stock(name: str, batch: int, loader: int) -> Any:
    return predictions("cpu", CHANGES[name], _loaders(loader), batch, loader)


def _loaders(loader: int) -> Any:
    return [rows(12, 2), rows(12, 2)] if loader else rows(2 * BATCHES, 2)


def assert_equals_stock(name: str, lazy: bool, batch: int, loader: int = 0) -> None:
    expected = stock(name, batch, loader)
    with installed(lazy=lazy):
        actual = predictions(HPUInferenceAccelerator(), CHANGES[name], _loaders(loader), batch, loader)
    assert_equal(actual, expected)


# The default run has all changes in lazy mode, and these, one of each kind, elsewhere; `make full` has all everywhere.
EACH_KIND = {
    "a string attribute",
    "a float attribute",
    "a function attribute",
    "a value in nested containers",
    "None becomes a tensor",
    "a NumPy array in place",
    "a buffer replaced",
    "a part in train mode",
    "a submodule replaced",
    "another network",
    "a_weight_replaced",
    "a_weight_in_place",
    "the_data_of_a_weight_replaced",
    "a_state_dict_assigned",
    "a_forward_hook",
    "a_global_hook",
    "the_forward_of_a_class",
    "a_parametrization",
    "autocast_in_the_step",
}


def changes(*, all_of: bool = False) -> list[Any]:
    """The names of changes, those of the full run marked."""
    marks = {name: [] if all_of or name in EACH_KIND else [pytest.mark.full] for name in CHANGES}
    return [pytest.param(name, marks=marks[name]) for name in CHANGES]


@quiet
@pytest.mark.parametrize("name", changes(all_of=True))
def test_rule_5_a_change_before_batch_6_equals_stock(name: str) -> None:
    assert_equals_stock(name, True, BEFORE)


@quiet
@pytest.mark.parametrize("name", changes())
def test_rule_5_in_eager_mode_a_change_before_batch_6_equals_stock(name: str) -> None:
    assert_equals_stock(name, False, BEFORE)


BETWEEN_LOADERS = [
    "a string attribute",
    "a buffer replaced",
    "a submodule replaced",
    "the_data_of_a_weight_replaced",
    "a_forward_hook",
    "the_forward_of_a_class",
]


@quiet
@MODES
@pytest.mark.parametrize("name", BETWEEN_LOADERS)
def test_rule_5_a_change_between_dataloaders_equals_stock(name: str, lazy: bool) -> None:
    assert_equals_stock(name, lazy, 0, 1)


def between_runs(accelerator: Any, make: Change) -> list[Any]:
    """Predictions of three runs of one Trainer: before a change, after it, and again."""
    ours, module = trainer(accelerator), Module().eval()
    found = [ours.predict(module, rows(8, 2))]
    torch.manual_seed(7)
    cleanup: Any = make(module)
    try:
        found += [ours.predict(module, rows(8, 2)) for _ in range(2)]
    finally:
        if callable(cleanup):
            cleanup()
    return found


# A plain attribute stays where it is when the model moves, so these cannot be made on the host.
ON_THE_DEVICE = {"None becomes a tensor", "a tensor in a list", "autocast_in_the_step"}


@quiet
@pytest.mark.parametrize("name", [each for each in changes() if each.values[0] not in ON_THE_DEVICE])
@pytest.mark.parametrize("lazy", [True, pytest.param(False, marks=pytest.mark.full)], ids=["lazy", "eager"])
def test_rule_5_a_change_between_runs_equals_stock(name: str, lazy: bool) -> None:
    expected = between_runs("cpu", CHANGES[name])
    with installed(lazy=lazy):
        assert_equal(between_runs(HPUInferenceAccelerator(), CHANGES[name]), expected)
