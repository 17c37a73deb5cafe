"""What the parts of batches and outputs are to who copies them: data, or something that there is one of."""

import sys
import weakref
from argparse import Namespace
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum, auto
from types import MappingProxyType, MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer.held import is_users as _is_users
from lightning_hpu_infer.nested import parts_of

FLAT = frozenset((str, bytes, int, float, bool, complex, type(None), torch.Size, torch.dtype, torch.device))
"""Types of which nothing can be written."""

# Nothing in them can be written, or they are no part of a batch that somebody refills.
_LEFT_ALONE = (str, bytes, int, float, complex, type(None), Enum, np.generic, type, nn.Module, Dataset, DataLoader)
# Modules whose classes, and those made of them, are shared on purpose: trainers, callbacks, loggers, optimizers.
_SHARED = ("lightning", "pytorch_lightning", "datasets", "tokenizers", "torch.optim", "torch.utils.data")
_SHARED_CLASSES = ("PushToHubMixin",)  # tokenizers, processors and configurations of transformers (5.1 `hub.py`)
# Modules of the standard library that classes of data may be made of. Other classes of it are locks, queues, threads,
# files, generators of random numbers, or values that cannot change.
_PLAIN = ("abc", "typing", "collections", "collections.abc", "_collections_abc", "numbers", "dataclasses", "contextlib")
_NAMESPACES = (SimpleNamespace, Namespace)
WRAPPERS = (UserDict, UserList, ChainMap)
"""Collections that are objects, with a collection of Python in an attribute."""
UNSET: Any = object()
"""What is in a slot that has no value."""


class Kind(Enum):
    """How a part is copied."""

    ITSELF = auto()
    """It is not: nobody can change it, or it is shared on purpose."""
    TENSOR = auto()
    ARRAY = auto()
    """Of NumPy, which may have objects in it."""
    BUFFER = auto()
    VIEW = auto()
    """Memory of another object, as a `memoryview` shows it."""
    LIST = auto()
    DEQUE = auto()
    DICT = auto()
    SET = auto()
    TUPLE = auto()
    FROZENSET = auto()
    MAPPING = auto()
    """Or a sequence, of another class than Python's own: by what it says it holds."""
    METHOD = auto()
    REFERENCE = auto()
    CLONE = auto()
    """By its `clone`."""
    DEEPCOPY = auto()
    """By its `__deepcopy__`."""
    DATACLASS = auto()
    """By its attributes, as all below. Lightning looks for tensors there too."""
    OBJECT = auto()
    LIBRARY = auto()
    """Of an installed package, mostly: only if it holds memory, such as tensors."""


_BY_BASE: tuple[tuple[Any, Kind], ...] = (
    (dict, Kind.DICT),
    (list, Kind.LIST),
    (tuple, Kind.TUPLE),
    (set, Kind.SET),
    (frozenset, Kind.FROZENSET),
    (deque, Kind.DEQUE),
    (np.ndarray, Kind.ARRAY),
    ((bytearray, array), Kind.BUFFER),
    (memoryview, Kind.VIEW),
    (MethodType, Kind.METHOD),
    ((*WRAPPERS, MappingProxyType), Kind.MAPPING),
)


_MEMORY = (Kind.TENSOR, Kind.ARRAY, Kind.BUFFER, Kind.VIEW, Kind.CLONE, Kind.DEEPCOPY)


def kind_of(cls: type) -> Kind:
    """How objects of a class are copied."""
    if issubclass(cls, Tensor):
        return Kind.TENSOR
    if issubclass(cls, _LEFT_ALONE):
        return Kind.ITSELF
    if clones_itself(cls):
        return Kind.CLONE
    for base, kind in _BY_BASE:
        if issubclass(cls, base):
            return kind
    if cls is weakref.ref:
        return Kind.REFERENCE
    parts = is_dataclass(cls) or issubclass(cls, Mapping)
    if not _is_data(cls) or (hasattr(cls, "__del__") and not parts):
        return Kind.ITSELF  # whoever gives something back when it goes must not do so twice
    if parts:
        return Kind.DATACLASS if is_dataclass(cls) else Kind.MAPPING
    if hasattr(cls, "__deepcopy__"):
        return Kind.DEEPCOPY
    declared = issubclass(cls, _NAMESPACES) or hasattr(cls, "__attrs_attrs__")
    if hasattr(cls, "__next__"):  # a loader, or a place in something that is read
        return Kind.LIBRARY
    return Kind.OBJECT if declared or is_users(cls) else Kind.LIBRARY


def is_users(cls: type) -> bool:
    """Whether a class is one of the user's own, such as one of a module that is not there: another process sent it."""
    return _is_users(cls) or cls.__module__ not in sys.modules


def moves_itself(cls: type) -> bool:
    """Whether Lightning lets objects of a class move what they hold to the device by themselves (2.6 `apply_func.py`).

    Not a `BatchEncoding` and the like, of which it is known that they move the tensors that are their parts.
    """
    return callable(getattr(cls, "to", None)) and not issubclass(cls, UserDict)


def clones_itself(cls: type) -> bool:
    """Whether objects of a class move and clone themselves, and so know of all memory that they have."""
    return moves_itself(cls) and callable(getattr(cls, "clone", None))


def _is_data(cls: type) -> bool:
    """Whether a class may be one of data, by what it is made of."""
    for base in cls.__mro__:
        module = base.__module__
        if base.__name__ in _SHARED_CLASSES or any(f"{module}.".startswith(f"{name}.") for name in _SHARED):
            return False
        plain = base is object or base in _NAMESPACES or module in _PLAIN
        if not plain and module.partition(".")[0] in sys.stdlib_module_names:
            return False
    return True


def is_constant(data: Any) -> bool:
    """Whether nothing can change in an object: it has no attributes, or is frozen and holds plain values only."""
    values = [value for _, value in attributes_of(data)]
    frozen = getattr(getattr(type(data), "__dataclass_params__", None), "frozen", False)
    return not values or (frozen and FLAT.issuperset(map(type, values)))


def dict_of(data: Any) -> dict[str, Any] | None:
    """The dictionary of an object's own attributes, if it has one. Nothing of its class is called."""
    try:
        found = object.__getattribute__(data, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


def slots_of(cls: type) -> list[MemberDescriptorType]:
    """The slots of a class and its bases."""
    slotted = [vars(base) for base in cls.__mro__ if "__slots__" in vars(base)]
    return [slot for each in slotted for slot in each.values() if isinstance(slot, MemberDescriptorType)]


def attributes_of(data: Any) -> Iterator[tuple[str, Any]]:
    """The attributes that an object has of its own, in its dictionary and its slots, with their values."""
    yield from list((dict_of(data) or {}).items())
    for slot in slots_of(type(data)):
        if (value := in_slot(slot, data)) is not UNSET:
            yield slot.__name__, value


def in_slot(slot: MemberDescriptorType, data: Any) -> Any:
    """What an object has in a slot."""
    try:
        return slot.__get__(data)
    except AttributeError:
        return UNSET


def holds_memory(data: Any) -> bool:
    """Whether somebody may fill tensors or arrays again that this holds, however deep."""
    rest, seen, kinds = [data], dict[int, Any](), dict[type, Kind]()
    while rest:
        part = rest.pop()
        cls = type(part)
        if cls in FLAT or id(part) in seen:
            continue
        seen[id(part)] = part  # or its id would be free for another one
        kind = kinds[cls] = kinds.get(cls) or kind_of(cls)
        if kind in _MEMORY:
            return True
        if kind is not Kind.ITSELF:
            parts = _parts(part)
            rest.extend([value for _, value in attributes_of(part)] if parts is None else parts)
    return False


def _parts(data: Any) -> Iterable[Any] | None:
    if isinstance(data, dict):
        return data.values()
    if isinstance(data, list | tuple | deque | set | frozenset):
        return data
    try:
        parts = parts_of(data)
    except Exception:  # it may compute them
        return ()
    return None if parts is None else parts.values()
