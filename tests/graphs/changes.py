"""What users change behind a captured graph: `CHANGES`, and a module that has everything to change."""

import copy
import functools
import io
import os
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


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
    weight = module.net.second.weight
    module.net.second.weight = scaled(module)
    return lambda: setattr(module.net.second, "weight", weight)


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
