"""Copies of batches whose memory their loader may write again while they are under way."""

import copy
from array import array
from collections import UserDict
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cached_property
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
    if type(loader) is not DataLoader:
        return True  # whatever its class overrides
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


def owned(data: Any, copied: Callable[[Tensor], Tensor] = copy_of, inside: Callable[[Tensor], Tensor] = copy_of) -> Any:
    """A batch or an output that stays as it is, whatever its loader or the step does next. Any thread.

    Tensors, NumPy arrays and collections are copied. So are objects of other classes if they can copy themselves
    (`clone` of those that can be moved, `__deepcopy__`), or if they hold such memory, however deep. What cannot be
    copied, and what nobody fills again, is the given object.

    Args:
        data: Any object.
        copied: Copies a tensor, or gives tensors back that nobody writes to.
        inside: The same for tensors in objects, and in collections that move themselves to the device.
    """
    try:
        return _Copies(copied, inside).of(data)
    except RecursionError:  # a list that holds itself, say
        return data


class _Copies:
    """The copies made of one batch. What occurs in it twice is copied once, as it is one object for the step."""

    def __init__(self, copied: Callable[[Tensor], Tensor], inside: Callable[[Tensor], Tensor]) -> None:
        self._copied, self._of_inside = copied, inside
        # With the original, whose id would otherwise be free for another object.
        self._made: dict[int, tuple[Any, Any]] = {}

    def of(self, data: Any) -> Any:
        """The copy of an object, or itself."""
        if isinstance(data, _LEFT_ALONE):
            return data
        if id(data) not in self._made:
            self._made[id(data)] = data, self._copied(data) if isinstance(data, Tensor) else self._copy(data)
        return self._made[id(data)][1]

    @cached_property
    def _inside(self) -> "_Copies":
        return self if self._copied is self._of_inside else _Copies(self._of_inside, self._of_inside)

    def _copy(self, data: Any) -> Any:
        if (parts := parts_of(data)) is None or _clones_itself(data):
            return self._copy_of_object(data)
        inside = self._inside if moves_itself(data) else self
        copied = {name: inside.of(part) for name, part in parts.items()}
        return _or_itself(data, lambda: with_parts(data, copied))

    def _copy_of_object(self, data: Any) -> Any:
        """An object with copies of the memory that it holds; itself if it holds none."""
        if isinstance(data, np.ndarray) and data.dtype == object:
            copied = data.copy()
            for place, part in enumerate(data.flat):
                copied.flat[place] = self._inside.of(part)
            return copied
        if isinstance(data, _BUFFERS):
            return copy.copy(data)
        if _clones_itself(data):
            return _or_itself(data, data.clone)
        if _deep_copies_itself(data):
            return _or_itself(data, lambda: copy.deepcopy(data))
        held = {name: value for name, value in _attributes(data) if _holds_memory(value, set())}
        if not held or hasattr(type(data), "__del__") or (copied := _or_itself(data, lambda: copy.copy(data))) is data:
            return data
        self._made[id(data)] = data, copied  # before its parts, which may refer to it
        for name, value in held.items():
            object.__setattr__(copied, name, self._inside.of(value))
        return copied


def _or_itself(data: Any, copied: Callable[[], Any]) -> Any:
    """A copy; the object itself if its class allows none. Stock Lightning makes none, so this must not end a run."""
    try:
        return copied()
    except Exception:
        return data


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


def _clones_itself(data: object) -> bool:
    return moves_itself(data) and callable(getattr(type(data), "clone", None))


def _deep_copies_itself(data: object) -> bool:
    """Such as a table of pandas, whose memory is out of sight."""
    return hasattr(type(data), "__deepcopy__")


def _holds_memory(data: Any, seen: set[int]) -> bool:
    """Whether somebody may fill memory again that this holds, however deep."""
    if isinstance(data, _LEFT_ALONE) or id(data) in seen:
        return False
    if isinstance(data, (Tensor, *_BUFFERS)) or _clones_itself(data) or _deep_copies_itself(data):
        return True
    seen.add(id(data))
    parts = parts_of(data)
    inside = (value for _, value in _attributes(data)) if parts is None else parts.values()
    return any(_holds_memory(part, seen) for part in inside)
