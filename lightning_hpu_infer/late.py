"""Whether a prediction writer may write what a step predicted after later steps have run."""

from collections.abc import Iterable, Sequence
from itertools import chain
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from lightning_hpu_infer.ahead import parts_of
from lightning_hpu_infer.bytecode import draws, names_in, seen_in, uses_of
from lightning_hpu_infer.held import Reach, attributes_of, called_by, functions_of, is_users
from lightning_hpu_infer.shared import Changes, assigned_variable, shared_state

# What of a module stays as it is while it predicts, and what of a Trainer may change.
_FIXED = {"device", "dtype", "hparams", "global_rank", "local_rank", "logger"}
_OF_TRAINERS = {"lightning_module", "model", "callbacks", "predict_loop", "callback_metrics", "logged_metrics"}
_DATA = {"predict_dataloaders", "datamodule"}


def may_write_late(writer: Any, steps: Sequence[Any], loaders: Iterable[Any]) -> bool:
    """Whether a writer is not seen to use what later steps or batches change, or to change what they use.

    Main thread only. Writers of installed packages are taken to use their arguments only.

    Args:
        writer: A callback with a method `write_on_batch_end`.
        steps: The module first, and the callbacks whose hooks run before its steps.
        loaders: The dataloaders.
    """
    write = getattr(writer.write_on_batch_end, "__func__", writer.write_on_batch_end)
    if not isinstance(write, FunctionType) or not is_users(type(writer)):
        return True
    parts = list(chain.from_iterable(map(parts_of, loaders)))
    before, after = Reach([*steps, *parts]), Reach([writer])
    if any(id(step) in after.found for step in steps) or id(writer) in before.found:
        return False
    changes = Changes(before.functions() | after.functions())
    held = [after.found[id(part)] for part in parts if id(part) in after.found]
    if any(changes.reach(each.value, {each.name}) for each in held):
        return False
    if shared_state(before, after) or assigned_variable(before, after):
        return False
    codes = [function.__code__ for function in after.functions()]
    seen = [seen_in(function.__code__) for function in before.functions()]
    changed = frozenset[str]().union(*(each.assigned | each.filled for each in seen))
    named = {name for code in codes for name in names_in(code)}
    if any(map(draws, codes)) or named & (_OF_TRAINERS - {"model"}) or (named & _DATA and named & changed):
        return False
    used = _used_of_module(write.__code__)
    return used is not None and _stays(steps[0], used - _FIXED, changed)


def _used_of_module(code: CodeType) -> frozenset[str] | None:
    """The attributes of the module that a writer's method uses; None if it may do more with the module than that."""
    if code.co_argcount < 3:
        rest = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :][:1]
        return None if any(any(uses_of(code, arguments)) for arguments in rest) else frozenset()
    trainer, module = (uses_of(code, argument) for argument in code.co_varnames[1:3])
    changes = module.assigned or module.attributes & seen_in(code).filled or "model" in trainer.attributes
    return None if module.passed_on or changes else module.attributes


def _stays(module: Any, used: frozenset[str], changed: frozenset[str]) -> bool:
    """Whether what is used of a module is as it was some steps before."""
    methods = {function.__name__: function.__code__ for function in functions_of(type(module))}
    everything = called_by(module, used)  # with what its own methods and properties use
    codes = [code for name, code in methods.items() if name in everything]
    if everything & changed or any(uses_of(code, "self").passed_on for code in codes):
        return False
    held = attributes_of(module)
    parts = {**held, **held.get("_buffers", {}), **held.get("_parameters", {}), **held.get("_modules", {})}
    if any(isinstance(parts.get(name), nn.Module) for name in everything):
        return False
    return all(name in parts or name in methods or not callable(getattr(type(module), name, len)) for name in used)
