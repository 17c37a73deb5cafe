"""Inputs on their way to the device: staging in pinned host memory, then copies that do not wait."""

from collections import UserDict
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.apply_func import _TransferableDataType
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_hpu_infer import _habana

_HOST = torch.device("cpu")


def to_host(data: Any) -> Any:
    """Move a collection to the host as Lightning does, but without its walk where there is one tensor only."""
    return data.cpu() if type(data) is Tensor else move_data_to_device(data, _HOST)


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch, as Lightning's walk finds them."""
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def size_of(batch: Any) -> int:
    """Bytes of a batch's tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(batch))


def own(batch: Any) -> Any:
    """Copy the tensors of a batch whose memory its loader may fill again for a later one."""
    return apply_to_collection(batch, Tensor, Tensor.clone)


def stage(batch: Any) -> Any:
    """Copy the host tensors of a batch to pinned memory, from where the device reads them without the host's help.

    Every tensor gets a buffer of its own that nobody writes again. So there is no moment at which a buffer could be
    reused too early, and the bridge keeps a buffer alive until its copy is done (bridge `tensor_utils.cpp`).

    Safe in any thread: it allocates host memory and touches no device tensor.

    Args:
        batch: Any collection of host tensors of any shape and dtype. Tensors that are pinned, sparse, or of a dtype
            that the bridge converts on the host, and objects with a `.to` of their own, stay as they are.
    """
    return apply_to_collection(batch, (Tensor, UserDict, _TransferableDataType), _stage_leaf)


def _stage_leaf(data: Any) -> Any:
    if isinstance(data, UserDict):
        # As `BatchEncoding.to` does: rebuilding it from its items would lose its other attributes.
        data.data = stage(data.data)
        return data
    if (
        not isinstance(data, Tensor)
        or data.device.type != "cpu"
        or data.is_sparse
        or not data.numel()
        or _habana.cast_on_host(data.dtype)
    ):
        return data
    return data.pin_memory(_habana.DEVICE_TYPE)
