"""The device memory that graphs read, kept from one run to the next while the model is on the host."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str]
"""A module that holds a tensor, and the name under which it does."""


def _held(root: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    for owner in root.modules():
        tensors: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        for each in tensors:
            for name, tensor in each.items():
                if tensor is not None:
                    yield (owner, name), tensor


class KeptWeights:
    """Aliases of the tensors that a model's graphs were captured with.

    Lightning moves the model to the CPU after a run and to other device memory before the next (Lightning
    `strategies/strategy.py`, `teardown`), while a graph goes on reading the memory that it was captured with.

    Args:
        root: The model, on the device.
    """

    def __init__(self, root: nn.Module) -> None:
        self._kept = {place: (tensor, tensor.detach()) for place, tensor in _held(root)}

    @torch.no_grad()
    def restore(self, root: nn.Module) -> dict[int, Tensor | None]:
        """Copy the model's present values into the kept memory, and make its tensors show that.

        So graphs of an earlier run are right again, whatever happened to the values in between.

        Args:
            root: The model, back on the device.

        Returns:
            Per tensor object of the earlier run, by `id`, the one that shows its memory now. None if there is none,
            since its shape, dtype or place changed.
        """
        now: dict[int, Tensor | None] = {id(before): None for before, _ in self._kept.values()}
        filled: set[int] = set()
        with torch.inference_mode(False):
            for place, tensor in _held(root):
                before, kept = self._kept.get(place, (None, None))
                if before is None or kept is None or _layout(kept) != _layout(tensor) or tensor.is_inference():
                    continue
                if id(before) not in filled:
                    filled.add(id(before))
                    kept.copy_(tensor.detach())
                    now[id(before)] = tensor
                elif tensor is not now[id(before)] and not torch.equal(kept, tensor):
                    continue  # It was shared with another one, and is no longer.
                tensor.data = kept
        return now


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
