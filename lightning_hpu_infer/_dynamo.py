"""TorchDynamo while it compiles for us: its settings, and repairs where it would trace something else than Python does.

Each was found on torch 2.13. Most of them break the graph, so that Python itself does what would be traced wrongly. A
name that another torch lacks is left out there; `tests/test_torch_names.py` fails if one is gone from the torch that is
tested, and `tests/graphs/test_python_state.py` if a repair has no effect.
"""

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch._dynamo import config, exc
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.misc import StringFormatVariable
from torch._dynamo.variables.tensor import SymNodeVariable
from torch._dynamo.variables.user_defined import UserDefinedClassVariable

from lightning_hpu_infer.held import is_users

_Repair = Callable[..., Any]
"""Called with the original function and its arguments."""
_MUTABLE = (list, dict, set, deque, bytearray)
_CHANGES_OF_LISTS = set(dir(list)) - set(dir(tuple)) - {"copy"}
_LOGGER = logging.getLogger("torch._dynamo")

_copies: dict[int, Any] = {}
"""By their ids: copies of the user's containers, which functions are called with whose results Dynamo takes over."""


def settings() -> dict[str, Any]:
    """Dynamo's settings while it compiles for us, by the names that this torch has."""
    limits = (
        ("recompile_limit", "accumulated_recompile_limit")  # since torch 2.7
        if hasattr(config, "accumulated_recompile_limit")
        else ("cache_size_limit", "accumulated_cache_size_limit")
    )
    settings: dict[str, Any] = {
        # Dynamo counts how often it compiled a code object, and past a limit silently runs that code as Python from
        # then on. After a graph break the code of `nn.Module.__call__` and of the user's classes is compiled
        # separately, once per model, so a process with many models would reach the limit. `TracedCall` has its limits.
        limits[0]: 2**20,
        limits[1]: 2**20,
        # By default there is no guard on hooks, so that one which is registered later is not called.
        "skip_nnmodule_hook_guards": False,
        # By default an `assert` on tensors becomes an op without a result, whose failure would be lost.
        "rewrite_assert_with_torch_assert": False,
        # By default NumPy is imitated with torch: other random numbers, other types, other order of ties.
        "trace_numpy": False,
        # By default everything that calls an `nn.LSTM` runs plainly.
        "allow_rnn": True,
    }
    if hasattr(config, "skip_guards_on_constant_func_defaults"):  # since torch 2.10
        settings["skip_guards_on_constant_func_defaults"] = False
    return {name: value for name, value in settings.items() if hasattr(config, name)}


@contextmanager
def repaired() -> Iterator[None]:
    """Surround Dynamo's work on a frame. One thread at a time: see `randomness.tracing`."""
    level = _LOGGER.level
    with ExitStack() as stack:
        for path, repair in REPAIRS.items():
            owner, name, original = found(path)
            if original is not None:
                stack.callback(setattr, owner, name, original)
                setattr(owner, name, _instead_of(original, repair))
        stack.callback(_copies.clear)
        # Where a graph breaks it logs pages about Dynamo's internals and settings, which are not the user's here.
        if level in (logging.NOTSET, logging.WARNING):
            stack.callback(_LOGGER.setLevel, level)
            _LOGGER.setLevel(logging.ERROR)
        yield


def found(path: str) -> tuple[Any, str, Any]:
    """The class, the name and the function of a path in `REPAIRS`; no function if this torch lacks it."""
    owners, _, name = path.rpartition(".")
    owner: Any = torch._dynamo
    for part in owners.split("."):
        owner = getattr(owner, part, None)
    return owner, name, getattr(owner, "__dict__", {}).get(name)


def _instead_of(original: Any, repair: _Repair) -> Any:
    function = getattr(original, "__func__", original)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return repair(function, *args, **kwargs)

    return staticmethod(call) if isinstance(original, staticmethod) else call


def _break(what: str) -> Exception:
    """What ends the graph, so that Python does this by itself."""
    return exc.Unsupported(f"{what} is left to Python")


# Text


def _constant_of(variable: Any) -> Any:
    """The value of a constant, or of a symbolic number in this call, with a guard on it."""
    try:
        if isinstance(variable, SymNodeVariable):
            return variable.evaluate_expr()
        return variable.as_python_constant()
    except Exception as error:  # it depends on a tensor's values, or on the user's code
        raise _break("formatting") from error


def _format_value(function: Any, self: Any, spec: Any, flags: int) -> Any:
    """`f"{i:03d}"` of a symbolic number was the number, where no other text is beside it."""
    value = self.pop()
    if isinstance(value, SymNodeVariable):
        if not flags & 3:
            text = f"{{:{spec.as_python_constant()}}}"
            return self.push(StringFormatVariable.create(text, [value.realize()], {}))
        value = ConstantVariable.create(_constant_of(value))  # `!s` and the like were ignored
    self.push(value)
    return function(self, spec, flags)


def _plain(variable: Any) -> Any:
    """Text of symbolic numbers as that of this call, with a guard on them; anything else as it is."""
    if not isinstance(variable, StringFormatVariable):
        return variable
    args = [_constant_of(each) for each in variable.sym_args]
    kwargs = {name: _constant_of(each) for name, each in variable.sym_kwargs.items()}
    return ConstantVariable.create(variable.format_string.format(*args, **kwargs))


def _make_key(function: Any, self: Any, key: Any) -> None:
    """Text of a symbolic number was a key that no other text is equal to."""
    function(self, _plain(key))


def _hash(function: Any, self: Any, tx: Any) -> Any:
    """And its hash was that of the variable."""
    text = _plain(self)
    return function(self, tx) if text is self else text.hash_impl(tx)


def _call_builtin(function: Any, self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
    """`format(i, "03d")` was traced as `str(i).format("03d")`."""
    if self.fn is not format:
        return function(self, tx, args, kwargs)
    constants = [_constant_of(each) for each in args]
    if kwargs or not all(isinstance(each, str | int | float) for each in constants):
        raise _break("format()")
    return ConstantVariable.create(format(*constants))


# Containers


def _wrap_listlike(function: Any, self: Any, value: Any) -> Any:
    """A deque had no bound."""
    variable = function(self, value)
    if isinstance(value, deque) and value.maxlen is not None and hasattr(variable, "maxlen"):
        variable.maxlen = ConstantVariable.create(value.maxlen)
    return variable


def _is_literal(function: Any, value: Any, *args: Any) -> bool:
    """Lists of numbers in a tuple were constants, and what was appended to them went into copies."""
    if isinstance(value, list | set):
        return False
    return bool(function(value, *args)) and (
        not isinstance(value, tuple) or all(_is_literal(function, each) for each in value)
    )


def _call_deque(function: Any, self: Any, tx: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """A copy of a deque had no bound."""
    if name == "copy":
        raise _break("a copy of a deque")
    return function(self, tx, name, *args, **kwargs)


def _change_list(function: Any, self: Any, tx: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Any other list that is a constant for Dynamo: to break the graph would change a copy, so nothing is traced."""
    if self.mutation_type is None and name in _CHANGES_OF_LISTS:
        raise RuntimeError(f"`{name}` of a list that TorchDynamo takes for a constant")
    return function(self, tx, name, *args, **kwargs)


def _track_existing(function: Any, self: Any, item: Any, *args: Any, **kwargs: Any) -> Any:
    """Additions to a set of what is not text or numbers were lost: assignments to its attributes were looked for."""
    if isinstance(item, set) and type(item) is not set:
        raise _break("a subclass of set")
    track = self.track_mutable if type(item) is set else functools.partial(function, self)
    return track(item, *args, **kwargs)


def _as_constant(function: Any, self: Any) -> Any:
    value = function(self)
    if isinstance(value, _MUTABLE):
        _copies[id(value)] = value
    return value


def _create_sourceless(function: Any, tx: Any, value: Any) -> Any:
    """`min(self.bins, key=len)` was one of a copy of `self.bins`."""
    if _has_copy(value):
        raise _break("a function that returns a part of its argument")
    return function(tx, value)


def _has_copy(value: Any) -> bool:
    if isinstance(value, _MUTABLE) and _copies.get(id(value)) is value:
        return True
    return type(value) in (list, tuple) and any(_has_copy(each) for each in value)


def _is_constant(function: Any, self: Any) -> bool:
    """An array of NumPy was a constant, changed while it was traced, and read then for all batches."""
    return not isinstance(vars(self).get("value"), np.ndarray) and bool(function(self))


def _store_attribute(function: Any, self: Any, item: Any, *args: Any, **kwargs: Any) -> Any:
    """What was assigned to a class was not seen at its objects."""
    if isinstance(item, UserDefinedClassVariable):
        raise _break("an attribute of a class")
    return function(self, item, *args, **kwargs)


# What has a state of its own


def _is_supported_random(function: Any, generator: Any) -> bool:
    """A `random.Random` drew from the state that it had when it was traced, for all batches."""
    return False


def _call_wrapper(function: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The cache of a function with `functools.lru_cache` was neither read nor filled."""
    wrapped = getattr(self.wrapper_obj, "__wrapped__", None)
    # Libraries cache what is installed and the like, on each call of a model.
    if hasattr(self.wrapper_obj, "cache_info") and isinstance(wrapped, FunctionType) and is_users(wrapped):
        raise _break("a function with functools.lru_cache")
    return function(self, *args, **kwargs)


REPAIRS: dict[str, _Repair] = {
    "symbolic_convert.InstructionTranslatorBase._format_value": _format_value,
    "variables.hashable.HashableTracker.__init__": _make_key,
    "variables.base.VariableTracker.hash_impl": _hash,
    "variables.builtin.BuiltinVariable.call_function": _call_builtin,
    "variables.builder.VariableBuilder.wrap_listlike": _wrap_listlike,
    "variables.constant.ConstantVariable.is_literal": _is_literal,
    "variables.lists.ListVariable.call_method": _change_list,
    "variables.lists.DequeVariable.call_method": _call_deque,
    "side_effects.SideEffects.track_object_existing": _track_existing,
    "side_effects.SideEffects.store_attr": _store_attribute,
    "variables.lists.BaseListVariable.as_python_constant": _as_constant,
    "variables.lists.DequeVariable.as_python_constant": _as_constant,
    "variables.ConstDictVariable.as_python_constant": _as_constant,
    "variables.SetVariable.as_python_constant": _as_constant,
    "variables.builder.SourcelessBuilder.create": _create_sourceless,
    "variables.base.VariableTracker.is_python_constant": _is_constant,
    "variables.misc.RandomVariable.is_supported_random_obj": _is_supported_random,
    "variables.functions.WrapperUserFunctionVariable.call_function": _call_wrapper,
}
"""By the names of what they replace in `torch._dynamo`."""
