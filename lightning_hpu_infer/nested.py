"""Nested collections, as batches and outputs are: walked, and copied only where a part of them changes."""

import copy
from array import array
from collections import UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from sys import getsizeof
from typing import Any

import numpy as np
from torch import Tensor

_FLAT = {array, bool, bytearray, bytes, complex, float, int, str, type(None)}
"""Types of which `getsizeof` tells all."""


def parts_of(data: Any) -> dict[Any, Any] | None:
    """What a collection holds, by key, field or index; None for anything else, tensors included."""
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return dict(zip(data._fields, data, strict=True))
    if isinstance(data, list | tuple | deque | UserList):
        return dict(enumerate(data))
    if is_dataclass(data) and not isinstance(data, type):
        return {f.name: getattr(data, f.name) for f in fields(data) if hasattr(data, f.name)}
    return None


def with_parts(data: Any, parts: dict[Any, Any]) -> Any:
    """A copy of a collection that has other parts under the same names.

    It is of the same type and keeps what is no part: attributes, the encodings of a `BatchEncoding`, a default factory.
    Attributes that are parts too have the other ones. No constructor is called, but for mappings that cannot be
    assigned to.

    Raises:
        Exception: Whatever the class raises if it allows no copies.
    """
    if isinstance(data, tuple):
        return _tuple_with_parts(data, parts)
    if isinstance(data, Mapping) and not isinstance(data, MutableMapping):
        return type(data)(parts)  # type: ignore[call-arg]
    copied = copy.copy(data)
    if copied is data:
        raise TypeError(f"{type(data).__name__} gives itself for a copy.")
    if isinstance(copied, MutableMapping) and not isinstance(copied, dict | UserDict):
        _set_own_storage(copied, data)
    before = parts_of(data) or {}
    for name, part in parts.items():
        if part is before[name]:
            continue
        if isinstance(copied, MutableMapping | list | deque | UserList):
            copied[name] = part
        else:
            object.__setattr__(copied, name, part)  # the dataclass may be frozen
    if isinstance(copied, MutableMapping | list | deque | UserList):
        _set_attributes(copied, data, {id(before[name]): part for name, part in parts.items()})
    return copied


def _tuple_with_parts(data: Any, parts: dict[Any, Any]) -> Any:
    try:
        copied: Any = tuple.__new__(type(data), parts.values())
    except TypeError:  # `torch.Size`, and what `torch.max` returns
        return type(data)(parts.values())
    if hasattr(data, "__dict__"):
        vars(copied).update(vars(data))
    return copied


def _set_own_storage(copied: Any, data: Any) -> None:
    """Copy the collections that a mapping shares with the one that it is a copy of: what is set in it goes there."""
    attributes = getattr(copied, "__dict__", {})
    for name, value in getattr(data, "__dict__", {}).items():
        if attributes.get(name) is value and isinstance(value, MutableMapping | list):
            attributes[name] = copy.copy(value)


def _set_attributes(copied: Any, data: Any, new: dict[int, Any]) -> None:
    """Set the attributes through which parts of a collection can be had as well, as `batch.x` for `batch["x"]`.

    Args:
        copied: Gets them.
        data: What it is a copy of.
        new: The new parts, by the ids of the old ones.
    """
    attributes = getattr(data, "__dict__", None)
    if attributes is data:
        copied.__dict__ = copied
    elif attributes:
        vars(copied).update({name: new[id(part)] for name, part in attributes.items() if id(part) in new})


def tensors_in(data: Any) -> Iterator[Tensor]:
    """The tensors in nested collections, in order. Other objects are passed over, whatever they hold."""
    if isinstance(data, Tensor):
        yield data
        return
    for part in (parts_of(data) or {}).values():
        yield from tensors_in(part)


def size_of(data: Any) -> int:
    """Bytes of what nested collections hold: tensors, arrays, strings, numbers. About as many, where they are sparse.

    Of an object of another class, what it says itself. Collections count as their parts do.
    """
    if isinstance(data, Tensor):
        return _bytes_of(data)
    if isinstance(data, np.ndarray):
        return data.nbytes + (size_of(data.ravel().tolist()) if data.dtype.hasobject else 0)
    if isinstance(data, memoryview | np.generic):
        return data.nbytes
    parts: Collection[Any]
    if isinstance(data, list | tuple | set | frozenset):
        parts = data
    elif (named := parts_of(data)) is not None:
        parts = named.values()
    else:
        return getsizeof(data, 0)
    # Of very many numbers or strings, without a call per part.
    return sum(map(getsizeof if _FLAT.issuperset(map(type, parts)) else size_of, parts))


def _bytes_of(tensor: Tensor) -> int:
    try:
        return tensor.nbytes
    except RuntimeError:  # Sparse tensors have none (torch 2.13).
        return int(tensor._nnz()) * (tensor.itemsize + 8 * tensor.dim())


def map_tensors(
    function: Callable[[Tensor], Tensor],
    data: Any,
    leaf: Callable[[Any], bool] | None = None,
    *,
    copies: bool = False,
) -> Any:
    """Nested collections with other tensors; see `map_leaves`. Every other object stays as it is, leaves too."""
    return map_leaves(lambda part: function(part) if isinstance(part, Tensor) else part, data, leaf, copies=copies)


def map_leaves(
    function: Callable[[Any], Any], data: Any, leaf: Callable[[Any], bool] | None = None, *, copies: bool = False
) -> Any:
    """Nested collections with other tensors, and other objects in place of those that `leaf` tells.

    Args:
        function: Gives what to use in place of a tensor or leaf, or that itself.
        data: Any object. Those that are neither a leaf nor a collection that this module knows stay as they are.
        leaf: Tells objects, collections or not, that are given to `function` instead of walked.
        copies: Whether all collections are new ones. Otherwise one in which nothing changes, or whose class allows no
            copies, is returned itself.
    """
    if isinstance(data, Tensor) or (leaf is not None and leaf(data)):
        return function(data)
    if (parts := parts_of(data)) is None or not (parts or copies):
        return data
    mapped = {name: map_leaves(function, part, leaf, copies=copies) for name, part in parts.items()}
    if not copies and all(mapped[name] is part for name, part in parts.items()):
        return data
    try:
        return with_parts(data, mapped)
    except Exception:
        if copies:
            raise
        return data
