"""The device memory that graphs read, kept from run to run while the model is on the host."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lightning_hpu_infer.graphs.store import tensor_description

Slot = tuple[nn.Module, str]
"""A module, and the name of one of its parameters or buffers."""


def _registered(root: nn.Module) -> Iterator[tuple[Slot, Tensor]]:
    for owner in root.modules():
        # A tensor that is registered twice is yielded twice, which the methods that torch has leave out.
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
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
        self._kept = {slot: (tensor, tensor.detach()) for slot, tensor in _registered(root)}

    @torch.no_grad()
    def restore(self, root: nn.Module) -> dict[int, Tensor | None]:
        """Copy the model's present values into the kept memory, and point its tensors to that.

        So the graphs of an earlier run are valid, whatever happened to the values in between.

        Args:
            root: The model, back on the device.

        Returns:
            Per tensor object of the earlier run, by `id`, the one that has its memory now. None if there is none,
            since its shape, strides, dtype or device changed, or the tensor was replaced.
        """
        now: dict[int, Tensor | None] = {id(before): None for before, _ in self._kept.values()}
        filled: set[int] = set()
        with torch.inference_mode(False):
            for slot, tensor in _registered(root):
                before, kept = self._kept.get(slot, (None, None))
                if before is None or kept is None or tensor.is_inference() or not _fits(tensor, kept):
                    continue
                if id(before) not in filled:
                    filled.add(id(before))
                    kept.copy_(tensor.detach())
                    now[id(before)] = tensor
                elif tensor is not now[id(before)] and not torch.equal(kept, tensor):
                    continue  # it was tied to another one, and no longer is
                tensor.data = kept
        return now


def _fits(tensor: Tensor, kept: Tensor) -> bool:
    return tensor.device == kept.device and tensor_description(tensor) == tensor_description(kept)
