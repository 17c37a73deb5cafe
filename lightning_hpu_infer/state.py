"""What a network holds besides its arguments: weights, buffers, attributes. A graph is right only while it stays."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_hpu_infer.signature import CONSTANTS, describe, flatten

Place = tuple[nn.Module, str]
"""The part of a network that holds something, and the name under which it does."""


def weights_of(module: nn.Module) -> dict[Place, Tensor]:
    """Parameters and buffers of a module and its parts. A shared one is there once for each of its places."""
    return {
        (owner, name): tensor
        for owner in module.modules()
        for tensors in (owner._parameters, owner._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    }


def tensors_kept_by(module: nn.Module) -> dict[Place, Tensor]:
    """Weights, buffers and plain attributes of a module and its parts."""
    attributes = {
        (owner, name): value
        for owner in module.modules()
        for name, value in vars(owner).items()
        if isinstance(value, Tensor)
    }
    return weights_of(module) | attributes


def replaced(before: dict[Place, Tensor], after: dict[Place, Tensor]) -> bool:
    """Whether any place holds another tensor object, or one more or less has a tensor."""
    return before.keys() != after.keys() or any(tensor is not after[place] for place, tensor in before.items())


class KeptState:
    """What a network held when its graphs were last used: which tensors, and the Python values of its attributes."""

    def __init__(self, module: nn.Module) -> None:
        self._values = _values_of(module)
        self.note_tensors(module)

    def note_tensors(self, module: nn.Module) -> None:
        """Take the module's present tensors for those that the graphs read."""
        self._tensors = tensors_kept_by(module)

    def holds(self, module: nn.Module) -> bool:
        """Whether the module holds the same tensors, and attributes with the same values."""
        return not replaced(self._tensors, tensors_kept_by(module)) and self._values == _values_of(module)


def _values_of(module: nn.Module) -> dict[Place, object]:
    values: dict[Place, object] = {}
    for owner in module.modules():
        for name, value in vars(owner).items():
            # The first is part of the key, the second is Lightning's, for every hook another one.
            if name in ("training", "_current_fx_name"):
                continue
            leaves, structure = flatten(value)
            if all(isinstance(leaf, CONSTANTS) for leaf in leaves):
                values[owner, name] = ([describe(leaf, "") for leaf in leaves], structure)
    return values


class KeptWeights:
    """The device tensors that a network's graphs read, held while the model itself is elsewhere.

    Lightning moves the model to the CPU after a run and to new device tensors before the next
    (Lightning `strategies/strategy.py`, `teardown`), while a graph reads those at which it was captured.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Aliases: where a move changes `parameter.data`, the parameter itself would not stay on the device.
        self._tensors = {place: tensor.detach() for place, tensor in weights_of(module).items()}

    def put_back(self, root: nn.Module) -> bool:
        """Give the network these tensors in place of its own if they are equal. Reads the device once.

        Args:
            root: What the network is part of; other modules of it may share its weights.
        """
        current = weights_of(self._module)
        if current.keys() != self._tensors.keys():
            return False
        equal = []
        for place, tensor in current.items():
            kept = self._tensors[place]
            if (kept.shape, kept.dtype, kept.device, kept.stride()) != (
                tensor.shape, tensor.dtype, tensor.device, tensor.stride()
            ):  # fmt: skip
                return False
            equal.append((kept == tensor).all())
        if equal and not bool(torch.stack(equal).all()):
            return False
        if not torch.__future__.get_overwrite_module_params_on_conversion():
            for place, tensor in current.items():
                tensor.data = self._tensors[place]
            return True
        # A move makes new parameters there, so there are none to preserve, but weights that are shared stay shared.
        instead = {
            id(tensor): nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
            for tensor, kept in ((tensor, self._tensors[place]) for place, tensor in current.items())
        }
        for owner in root.modules():
            held: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for tensors in held:
                tensors.update({name: instead[id(own)] for name, own in tensors.items() if id(own) in instead})
        return True
