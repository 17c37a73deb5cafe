"""What can be had through the attributes of objects, without calling anything of theirs."""

import sys
import sysconfig
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    GeneratorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import Sampler

from lightning_hpu_infer.bytecode import draws, names_in, seen_in

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
_NOT_PREDICTING = ("reset_parameters", "init_weights", "_init_weights", "configure_optimizers", "training_step")
_HOOKS_OF_MODULES = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
_ITERATORS: tuple[type[Any], ...] = (
    map,
    filter,
    zip,
    enumerate,
    type(iter([])),
)  # which say what they hold without going on
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)
_LOGGING = (
    "log",
    "log_dict",
)  # methods of the module, which Lightning 2.6 gives to its callbacks
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
    """Whether it is a global variable, or an item of a dictionary or namespace: there are options, and constants."""


_Part = tuple[str, Any, bool]  # as in `Held`: its name, its value, and whether it is in settings


class Reach:
    """The objects that can be had from some, nearest first, and no more than a bound.

    Functions hold what they have closed over and, if they are the user's, the global variables that they name; methods
    and `partial` objects what they are called with. What Python's classes and modules hold, and Trainers, is left out.

    Args:
        roots: Where to begin, the most important first. They are their own holders.
        also: What some object holds, without the rest of it.
        beside: Found before; what both find is looked into there only.
    """

    def __init__(self, roots: Iterable[Any], also: Iterable[Held] = (), beside: "Reach | None" = None) -> None:
        self.found: dict[int, Held] = {}
        """By the ids of the objects."""
        self._kinds = set[type]()  # whose functions were looked at
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

    def drawing(self) -> str:
        """What is seen to draw random numbers or to seed, libraries' classes included; empty for nothing."""
        functions = self.functions().union(*(functions_of(kind) for kind in {type(held.value) for held in self}))
        functions = {function for function in functions if function.__name__ not in _NOT_PREDICTING}
        codes = {function.__qualname__: function.__code__ for function in functions}
        found = {name for name, code in codes.items() if draws(code)}
        trains = any("train" in names_in(code) for code in codes.values())
        dropouts = (held.value for held in self if isinstance(held.value, _DROPOUTS))
        found.update(type(dropout).__name__ for dropout in dropouts if trains or dropout.training)
        return min(found, default="")

    def _inside(self, held: Held) -> Iterator[Held]:
        value, depth = held.value, held.depth + 1
        if isinstance(value, list | tuple | deque):
            return (held._replace(value=part, depth=depth) for part in list(islice(value, _LOOKED_AT)))
        if isinstance(value, dict):
            parts = list(islice(value.items(), _LOOKED_AT))
            return (Held(part, held.holder, str(key), depth, in_settings=True) for key, part in parts)
        return (Held(part, value, name, depth, settings) for name, part, settings in self._parts(value))

    def _parts(self, value: Any) -> Iterator[_Part]:
        if isinstance(value, FunctionType):
            yield from _named_by(value)
            yield from ((value.__name__, part, False) for part in value.__defaults__ or ())
        elif isinstance(value, MethodType):
            yield from (("__self__", value.__self__, False), ("__func__", value.__func__, False))
        elif isinstance(value, BuiltinFunctionType):
            yield "__self__", value.__self__, False
        elif isinstance(value, partial):
            yield from (("func", value.func, False), ("args", value.args, False))
            yield from ((name, part, False) for name, part in value.keywords.items())
        elif isinstance(value, GeneratorType):
            if (frame := value.gi_frame) is not None:
                yield from [(name, part, False) for name, part in frame.f_locals.items()]
                yield value.__name__, _function_of(value.gi_code, frame), False
        elif isinstance(value, _ITERATORS):
            yield from ((type(value).__name__, part, False) for part in value.__reduce__()[1])
        elif not isinstance(value, (*CONSTANT, Tensor)):
            kind = type(value)
            skipped: Iterable[str] = _HOOKS_OF_MODULES if isinstance(value, nn.Module) else ()
            if isinstance(value, Callback):
                skipped = _LOGGING
            elif isinstance(value, Sampler) and not is_users(kind):
                skipped = _SAMPLED
            settings = isinstance(value, Namespace | SimpleNamespace)
            yield from [(name, part, settings) for name, part in attributes_of(value).items() if name not in skipped]
            if kind not in self._kinds and is_users(kind):
                yield from ((each.__name__, each, True) for each in kind.__mro__ if is_users(each))
                yield from (part for function in functions_of(kind) for part in _named_by(function))
            self._kinds.add(kind)


def attributes_of(value: Any) -> dict[str, Any]:
    """An object's own attributes; none of one that has no dictionary of them, or does not give it."""
    try:
        found = value.__dict__
    except Exception:  # a proxy of something that is gone, say
        return {}
    return found if isinstance(found, dict) else {}


def is_users(value: type | FunctionType | ModuleType) -> bool:
    """Whether a class, a function or a module of Python is one of the user's own, and not of an installed package."""
    module = value.__name__ if isinstance(value, ModuleType) else value.__module__ or ""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None)
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


def called_by(owner: Any, names: Iterable[str]) -> set[str]:
    """Names, and those in the code of an object's methods of these names, and of the methods that they name."""
    functions = {function.__name__: function for function in functions_of(type(owner))}
    found, rest = set[str](), set(names)
    while rest:
        found |= rest
        rest = {name for each in rest & functions.keys() for name in names_in(functions[each].__code__)} - found
    return found


def used_by(owner: Any, methods: Iterable[str]) -> Iterator[Held]:
    """What an object holds under names that its methods, and those that they name, have in their code."""
    names = called_by(owner, methods)
    yield from (Held(value, owner, name, 1) for name, value in attributes_of(owner).items() if name in names)


def _function_of(code: CodeType, frame: FrameType) -> FunctionType:
    """A function with the code of a generator, closed over the same values."""
    cells = tuple(CellType(*(frame.f_locals[name],) if name in frame.f_locals else ()) for name in code.co_freevars)
    return FunctionType(code, frame.f_globals, code.co_name, None, cells)


def _named_by(function: FunctionType) -> Iterator[_Part]:
    """What a function has closed over, and the global variables that a function of the user's names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents, False
        except ValueError:  # it is not assigned yet
            continue
    if not is_users(function):
        return
    seen, variables = seen_in(function.__code__), function.__globals__
    yield from ((name, variables[name], True) for name in seen.variables & variables.keys())
    for name, attribute in seen.parts:
        module = variables.get(name)
        if isinstance(module, ModuleType) and is_users(module) and hasattr(module, attribute):
            yield attribute, getattr(module, attribute), True
