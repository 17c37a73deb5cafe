"""What can be had through the attributes of objects, without calling anything of theirs."""

import sys
import sysconfig
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from types import BuiltinFunctionType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import Sampler

CONSTANT = (
    *(str, bytes, int, float, complex, tuple, frozenset, range, slice, type(None), np.generic, np.dtype),
    *(type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, partial),
    *(torch.dtype, torch.device, torch.Size, Trainer),
)
"""Nothing of their own can be changed, or nobody would leave there what one batch tells the next."""

# Collections may be lists of all samples, and models have thousands of modules.
_LOOKED_AT, _DEPTH, _OBJECTS = 16, 4, 20_000
_LEAVES = frozenset((bool, int, float, str, bytes, type(None)))
_BEFORE_A_RUN = ("__init__", "__post_init__", "__new__", "__setstate__")
_HOOKS_OF_MODULES = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
_SAMPLED = ("data_source", "dataset")  # of which samplers of torch and Lightning ask for the length only
_KNOWN = ("torch", "lightning", "pytorch_lightning", "transformers", "lightning_hpu_infer")
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class Held(NamedTuple):
    """An object that was found, and where."""

    value: Any
    holder: Any
    """What holds it, past lists and dictionaries."""
    name: str
    """The attribute, or variable, that it is under."""
    depth: int = 0
    in_settings: bool = False
    """Whether it is an item of a dictionary or namespace, where options are."""


class Reach:
    """The objects that can be had from some, nearest first, and no more than a bound.

    Functions hold what they have closed over, methods and `partial` objects what they are called with. Classes, modules
    of Python, and what Trainers hold are left out.

    Args:
        roots: Where to begin, the most important first. They are their own holders.
        also: What some object holds, without the rest of it.
        beside: Found before; what both find is looked into there only.
    """

    def __init__(self, roots: Iterable[Any], also: Iterable[Held] = (), beside: "Reach | None" = None) -> None:
        self.found: dict[int, Held] = {}
        """By the ids of the objects."""
        self._closed: dict[type, list[tuple[str, Any]]] = {}
        rest = deque([*(Held(root, root, "") for root in roots), *also])
        while rest and len(self.found) < _OBJECTS:
            held = rest.popleft()
            if id(held.value) in self.found:
                continue
            self.found[id(held.value)] = held
            if held.depth == 0 or (held.depth < _DEPTH and (beside is None or id(held.value) not in beside.found)):
                rest.extend(part for part in self._inside(held) if type(part.value) not in _LEAVES)

    def __iter__(self) -> Iterator[Held]:
        return iter(self.found.values())

    def functions(self) -> set[FunctionType]:
        """The functions that were found, and those of the classes of the user's objects."""
        found = {held.value for held in self if isinstance(held.value, FunctionType)}
        for kind in {type(held.value) for held in self}:
            found.update(functions_of(kind) if is_users(kind) else ())
        return found

    def _inside(self, held: Held) -> Iterator[Held]:
        value, depth = held.value, held.depth + 1
        if isinstance(value, list | tuple | deque):
            return (held._replace(value=part, depth=depth) for part in list(islice(value, _LOOKED_AT)))
        if isinstance(value, dict):
            parts = list(islice(value.items(), _LOOKED_AT))
            return (Held(part, held.holder, str(key), depth, in_settings=True) for key, part in parts)
        settings = isinstance(value, Namespace | SimpleNamespace)
        return (Held(part, value, name, depth, settings) for name, part in self._attributes(value))

    def _attributes(self, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, FunctionType):
            yield from _closed_over(value)
            yield from ((value.__name__, part) for part in value.__defaults__ or ())
        elif isinstance(value, MethodType):
            yield from (("__self__", value.__self__), ("__func__", value.__func__))
        elif isinstance(value, partial):
            yield from (("func", value.func), ("args", value.args), *value.keywords.items())
        elif isinstance(value, GeneratorType):
            yield from list(value.gi_frame.f_locals.items()) if value.gi_frame is not None else ()
        elif not isinstance(value, (*CONSTANT, Tensor)):
            kind = type(value)
            skipped: Iterable[str] = _HOOKS_OF_MODULES if isinstance(value, nn.Module) else ()
            if isinstance(value, Sampler) and not is_users(kind):
                skipped = _SAMPLED
            yield from [item for item in attributes_of(value).items() if item[0] not in skipped]
            if kind not in self._closed:
                functions = functions_of(kind) if is_users(kind) else ()
                self._closed[kind] = [held for function in functions for held in _closed_over(function)]
            yield from self._closed[kind]


def attributes_of(value: Any) -> dict[str, Any]:
    """An object's own attributes; none of one that has no dictionary of them, or does not give it."""
    try:
        found = value.__dict__
    except Exception:  # a proxy of something that is gone, say
        return {}
    return found if isinstance(found, dict) else {}


def is_users(kind: type) -> bool:
    """Whether a class is one of the user's own, and not of an installed package."""
    top = kind.__module__.partition(".")[0]
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    installed = file is None or file.startswith(_INSTALLED) or "-packages" in file
    return top == "__main__" or (top not in _KNOWN and not installed)


def functions_of(kind: type) -> Iterator[FunctionType]:
    """What a class and its bases define and a run may call, but for bases of torch, Lightning and the like."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in (*_KNOWN, *sys.stdlib_module_names) and base.__module__ != "__main__":
            continue
        for name, value in list(vars(base).items()):
            function = getattr(value, "fget", getattr(value, "__func__", value))
            if isinstance(function, FunctionType) and name not in _BEFORE_A_RUN:
                yield function


def names_in(code: CodeType) -> Iterator[str]:
    """The attributes and global variables that a code names, with the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def used_by(owner: Any, methods: Iterable[str]) -> Iterator[Held]:
    """What an object holds under names that its methods, and those that they name, have in their code."""
    functions = {function.__name__: function for function in functions_of(type(owner))}
    names, rest = set[str](), set(methods)
    while rest:
        names |= rest
        rest = {name for each in rest & functions.keys() for name in names_in(functions[each].__code__)} - names
    yield from (Held(value, owner, name, 1) for name, value in attributes_of(owner).items() if name in names)


def _closed_over(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # it is not assigned yet
            continue
