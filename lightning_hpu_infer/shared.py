"""What two sides of a run both hold, and may change."""

import queue
import random
import threading
from argparse import Namespace
from collections.abc import Iterable, MutableMapping, MutableSequence, MutableSet
from functools import partial
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from lightning_hpu_infer.bytecode import names_in, seen_in
from lightning_hpu_infer.held import CONSTANT, Held, Reach, attributes_of, functions_of, is_users

_STATE = (
    *(MutableSequence, MutableSet, np.ndarray, Tensor),
    *(torch.Generator, np.random.Generator, np.random.RandomState, random.Random),
    *(queue.Queue, queue.SimpleQueue, threading.Event, threading.Condition, threading.Semaphore),
)
_PARTS = (Dataset, Sampler, nn.Module, Callback, LightningDataModule, FunctionType, MethodType, partial)


def shared_state(one: Reach, other: Reach) -> tuple[Held, Held] | None:
    """What both have found and may change: where the one holds it, and where the other does; None for nothing.

    Lists, sets, arrays, tensors and generators of random numbers may change. Settings, global variables, lists of names
    and objects such as tokenizers are taken to stay as they are, unless a user's function is seen to change them.
    """
    changes: Changes | None = None
    for key, held in one.found.items():
        beside = other.found.get(key)
        if beside is None or not held.depth or not beside.depth or _is_constant(held.value):
            continue
        if _is_state(held.value) and not (_belongs_to_a_library(held) or _belongs_to_a_library(beside)):
            return held, beside
        changes = changes or Changes(one.functions() | other.functions())
        if changes.reach(held.value, {held.name, beside.name}):
            return held, beside
    return None


def _is_constant(value: Any) -> bool:
    if isinstance(value, type | ModuleType | FunctionType):
        return not is_users(value)  # those of the user's have attributes that both may change
    return isinstance(value, CONSTANT)


def _is_state(value: Any) -> bool:
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        return False  # names of classes, say
    if isinstance(value, MutableMapping):
        return not value
    if isinstance(value, Namespace | SimpleNamespace):
        return not vars(value)
    return isinstance(value, _STATE)


def _belongs_to_a_library(held: Held) -> bool:
    """Whether it is what a transform, a tokenizer or settings have for themselves, or a global constant."""
    return held.in_settings or (
        held.depth > 1 and not isinstance(held.holder, _PARTS) and not is_users(type(held.holder))
    )


def assigned_variable(one: Reach, other: Reach) -> str:
    """A variable outside of functions that those of one side assign to and those of the other use; empty for none."""
    (used, stored), (used_there, stored_there) = map(_variables, (one, other))
    found = (stored & used_there) | (stored_there & used)
    return min((name for _, name in found), default="")


def _variables(side: Reach) -> tuple[set[tuple[int, str]], set[tuple[int, str]]]:
    """Which variables functions use and assign to: the ids of their modules' globals, or of cells, and their names."""
    used, stored = set(), set()
    for function in side.functions():
        code, module = function.__code__, id(function.__globals__)
        seen = seen_in(code)
        cells = {name: id(cell) for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True)}
        stored |= {(module, name) for name in seen.stored}
        stored |= {(cell, name) for name, cell in cells.items() if name in seen.stored_in_cells}
        used |= {(module, name) for name in seen.variables | seen.stored}
        used |= {(cell, name) for name, cell in cells.items()}
    return used, stored


class Changes:
    """What functions are seen to change. Names stand for objects, so it is a guess, and only of what they name."""

    def __init__(self, functions: Iterable[FunctionType]) -> None:
        self._seen = {function: seen_in(function.__code__) for function in functions}
        self._changing = {
            function.__name__ for function, seen in self._seen.items() if seen.changed_arguments - {"self", "cls"}
        }
        self._by_all = self._names(self._seen.keys())

    def _names(self, functions: Iterable[FunctionType]) -> tuple[frozenset[str], frozenset[str]]:
        """Names of attributes that functions assign to, and of what they fill, or have other functions fill."""
        seen = [self._seen[function] for function in functions]
        calls = [names for each in seen for names in each.statements if not names.isdisjoint(self._changing)]
        return (
            frozenset[str]().union(*(each.assigned for each in seen)),
            frozenset[str]().union(*(each.filled for each in seen), *calls),
        )

    def reach(self, value: Any, names: set[str]) -> bool:
        """Whether they change an object.

        Args:
            value: The object.
            names: Those under which it is held.
        """
        assigned, filled = self._by_all
        if names & filled:
            return True
        kind = type(value)
        if isinstance(value, Namespace | SimpleNamespace):
            return bool(attributes_of(value).keys() & (assigned | filled))
        if not is_users(kind):
            return False
        methods = set(functions_of(kind))  # which change it only if somebody calls them
        assigned, filled = self._names(self._seen.keys() - methods)
        return bool(attributes_of(value).keys() & (assigned | filled)) or self._call_what_changes(methods)

    def _call_what_changes(self, methods: set[FunctionType]) -> bool:
        """Whether a method is called that changes its object. Of `__call__` and the like it is not seen who does."""
        called = {name for function in self._seen.keys() - methods for name in names_in(function.__code__)}
        rest = set(methods)
        while found := {each for each in rest if each.__name__ in called or each.__name__.startswith("__")}:
            rest -= found
            if any(seen.assigned or seen.filled for seen in (seen_in(each.__code__) for each in found)):
                return True
            called |= {name for each in found for name in names_in(each.__code__)}
        return False
