"""Copies of batches whose memory their loader may write again while they are under way."""

import copy
from array import array
from collections import UserDict
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_hpu_infer.nested import parts_of, with_parts

_BUFFERS = (np.ndarray, bytearray, array, set)
# Nothing in them can be written, or they are no part of a batch that somebody refills.
_LEFT_ALONE = (str, bytes, int, float, complex, type(None), Enum, np.generic, type, nn.Module, Dataset, DataLoader)


def may_reuse_memory(loader: object) -> bool:
    """Whether a loader may yield memory that it writes again.

    `default_collate` has just made what it returns, and worker processes send copies. A collate function of the user's
    may return the dataset's own memory.
    """
    if isinstance(loader, list | tuple):
        return False  # of batches: it has no code that could write to them
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return True
    return loader.num_workers == 0 and loader.collate_fn is not default_collate


def copy_of(tensor: Tensor) -> Tensor:
    """A copy of a host tensor that differs in nothing but its memory; any other tensor itself.

    Work of a device belongs to the main thread, and this may be another one.
    """
    if tensor.device.type != "cpu":
        return tensor
    # One that is made in inference mode would be refused by autograd in the step.
    with torch.inference_mode(tensor.is_inference()):
        copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    if attributes := getattr(tensor, "__dict__", None):
        vars(copied).update(attributes)
    return copied


def owned(data: Any, copied: Callable[[Tensor], Tensor] = copy_of) -> Any:
    """A batch that stays as it is, whatever its loader does next. Any thread.

    Tensors, NumPy arrays and collections are copied. So are objects of other classes if they can `clone()` themselves,
    or if an attribute of theirs is such memory. What cannot be copied, and what no loader refills, is the given object.

    Args:
        data: Any object.
        copied: Copies a tensor, or gives tensors back that nobody writes to. It is not used for tensors in objects
            that move themselves to the device.
    """
    return _Copies(copied).of(data)


class _Copies:
    """The copies made of one batch. What occurs in it twice is copied once, as it is one object for the step."""

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        self._copied = copied
        # With the original, whose id would otherwise be free for another object.
        self._made: dict[int, tuple[Any, Any]] = {}

    def of(self, data: Any) -> Any:
        """The copy of an object, or itself."""
        if isinstance(data, _LEFT_ALONE):
            return data
        if id(data) not in self._made:
            self._made[id(data)] = data, self._copy(data)
        return self._made[id(data)][1]

    def _copy(self, data: Any) -> Any:
        if isinstance(data, Tensor):
            return self._copied(data)
        if isinstance(data, _BUFFERS):
            return copy.copy(data)
        try:
            if moves_itself(data) and callable(getattr(type(data), "clone", None)):
                return data.clone()
            if (parts := parts_of(data)) is not None:
                inside = _Copies(copy_of) if moves_itself(data) else self
                return with_parts(data, {name: inside.of(part) for name, part in parts.items()})
            return self._copy_of_object(data)
        except Exception:
            # Its class allows no copy. Stock Lightning makes none, so this must not be what ends the run.
            return data

    def _copy_of_object(self, data: Any) -> Any:
        """An object with copies of the memory that it holds; itself if it holds none."""
        held = {name: value for name, value in _attributes(data) if _holds_memory(value)}
        if not held or hasattr(type(data), "__del__"):
            return data
        copied, inside = copy.copy(data), _Copies(copy_of)
        if copied is data:
            return data
        for name, value in held.items():
            object.__setattr__(copied, name, inside.of(value))
        return copied


def moves_itself(data: object) -> bool:
    """Whether Lightning lets an object move what it holds to the device by itself (2.6 `apply_func.py`).

    Not a `BatchEncoding` and the like, of which it is known that they move the tensors that are their parts.
    """
    return callable(getattr(type(data), "to", None)) and not isinstance(data, UserDict)


def _attributes(data: object) -> Iterator[tuple[str, Any]]:
    yield from getattr(data, "__dict__", {}).items()
    for kind in type(data).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(data, name):
                yield name, getattr(data, name)


def _holds_memory(data: Any) -> bool:
    if isinstance(data, _LEFT_ALONE):
        return False
    if isinstance(data, (Tensor, *_BUFFERS)) or (moves_itself(data) and hasattr(type(data), "clone")):
        return True
    return any(map(_holds_memory, (parts_of(data) or {}).values()))
