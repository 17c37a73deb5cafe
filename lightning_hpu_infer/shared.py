"""What two sides of a run both hold, and may change."""

import dis
import random
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence, MutableSet
from functools import partial
from itertools import pairwise
from types import CodeType, FunctionType, MappingProxyType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from lightning_hpu_infer.held import CONSTANT, Held, Reach, attributes_of, functions_of, is_users, names_in

_STATE = (
    *(MutableSequence, MutableSet, np.ndarray, Tensor),
    *(torch.Generator, np.random.Generator, np.random.RandomState, random.Random),
)
_PARTS = (Dataset, Sampler, nn.Module, Callback, LightningDataModule, FunctionType, MethodType, partial)
# Methods that change what they belong to; so do those of tensors whose names end with an underscore.
_CHANGES = {
    name
    for kind, fixed in ((list, tuple), (deque, tuple), (set, frozenset), (dict, MappingProxyType))
    for name in dir(kind)
    if name not in dir(fixed)
} - {"copy", "fromkeys", "maxlen"}


def shared_state(one: Reach, other: Reach) -> tuple[Held, Held] | None:
    """What both have found and may change: where the one holds it, and where the other does; None for nothing.

    Lists, sets, arrays, tensors and generators of random numbers may change. Settings, lists of names, and objects such
    as tokenizers are taken to stay as they are, unless a function of the user's is seen to change them.
    """
    changes: _Changes | None = None
    for key, held in one.found.items():
        beside = other.found.get(key)
        if beside is None or not held.depth or not beside.depth or isinstance(held.value, CONSTANT):
            continue
        if _is_state(held.value):
            if not (_belongs_to_a_library(held) or _belongs_to_a_library(beside)):
                return held, beside
            continue
        changes = changes or _Changes(one.functions() | other.functions())
        if changes.reach(held.value, {held.name, beside.name}):
            return held, beside
    return None


def _is_state(value: Any) -> bool:
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return False  # names of classes, say
    if isinstance(value, MutableMapping):
        return not value
    if isinstance(value, Namespace | SimpleNamespace):
        return not vars(value)
    return isinstance(value, _STATE)


def _belongs_to_a_library(held: Held) -> bool:
    """Whether it is what a transform, a tokenizer or settings have for themselves."""
    return held.in_settings or (
        held.depth > 1 and not isinstance(held.holder, _PARTS) and not is_users(type(held.holder))
    )


def reads_changes(reader: object, name: str, owner: object) -> bool:
    """Whether methods of an object are seen to read attributes of another one that its own methods change.

    Args:
        reader: The object that reads.
        name: The argument under which its methods have the other one.
        owner: The other one.
    """
    read: set[Any] = set()
    for function in functions_of(type(reader)):
        for before, step in pairwise(dis.get_instructions(function.__code__)):
            loaded = before.argval[-1] if isinstance(before.argval, tuple) else before.argval
            if loaded == name and before.opname.startswith("LOAD_FAST") and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                read.add(step.argval)
    changed = {name for function in functions_of(type(owner)) for name, _ in _changed_in(function.__code__)}
    return bool(read & changed)


class _Changes:
    """What functions are seen to change. Names stand for objects, so it is a guess, and only of what they name."""

    def __init__(self, functions: Iterable[FunctionType]) -> None:
        self._functions = set(functions)
        self._assigned: set[str] = set()
        self._filled: set[str] = set()
        for function in self._functions:
            for name, filled in _changed_in(function.__code__):
                (self._filled if filled else self._assigned).add(name)

    def reach(self, value: Any, names: set[str]) -> bool:
        """Whether they change an object.

        Args:
            value: The object.
            names: Those under which it is held.
        """
        if names & self._filled:
            return True
        kind = type(value)
        if isinstance(value, Namespace | SimpleNamespace):
            return bool(attributes_of(value).keys() & self._assigned)
        return is_users(kind) and (
            bool(attributes_of(value).keys() & self._assigned) or self._call_what_changes(set(functions_of(kind)))
        )

    def _call_what_changes(self, methods: set[FunctionType]) -> bool:
        """Whether a method is called that changes its object. Of `__call__` and the like it is not seen who does."""
        called = {name for function in self._functions - methods for name in names_in(function.__code__)}
        rest = set(methods)
        while found := {each for each in rest if each.__name__ in called or each.__name__.startswith("__")}:
            rest -= found
            if any(True for each in found for _ in _changed_in(each.__code__)):
                return True
            called |= {name for each in found for name in names_in(each.__code__)}
        return False


def _changed_in(code: CodeType) -> Iterator[tuple[str, bool]]:
    """Names of what is changed: of attributes that are assigned to, and (True) of that whose content is changed."""
    steps: list[dis.Instruction] = [*dis.get_instructions(code)]
    for at, step in enumerate(steps):
        target: int | None = None  # so many steps ago the object was loaded
        if step.opname in ("STORE_ATTR", "DELETE_ATTR"):
            yield step.argval, False
            target = 1
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            in_place = step.argval.endswith("_") and not step.argval.endswith("__")
            target = 1 if step.argval in _CHANGES or in_place else None
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            target = 4 if steps[at - 1].opname == "BUILD_SLICE" else 2
        elif step.opname == "STORE_SLICE":
            target = 3
        if target is not None and steps[at - target].opname in ("LOAD_ATTR", "LOAD_DEREF"):
            yield steps[at - target].argval, True
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _changed_in(constant)
