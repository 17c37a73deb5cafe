"""Lazy mode names every module by the attribute that it is assigned to, with hooks (bridge: torch_overwrites.py).

Dynamo traces through the wrappers, as through the bridge's, so they are plain functions and their state is global.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

Module = torch.nn.Module
Hook = Callable[..., None]
Assign = Callable[[Module, str, Any], None]

_hooks: tuple[Hook, ...] = ()
"""The one before and the one after a forward; empty while nothing is named."""
_named: weakref.WeakValueDictionary[int, Module] = weakref.WeakValueDictionary()
"""By id, since a module may compare by value."""


def start(pre_hook: Hook, post_hook: Hook) -> None:
    """Name modules from now on."""
    global _hooks
    _hooks = (pre_hook, post_hook)


def stop() -> None:
    """Take the hooks off the modules that live; copies of them keep theirs, which do no harm."""
    global _hooks
    hooks, _hooks = _hooks, ()
    for module in list(_named.values()):
        for registered in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in registered.items() if hook in hooks]:
                del registered[key]
                module._forward_hooks_always_called.pop(key, None)
        for attribute in ("custom_name", "names_hook"):
            vars(module).pop(attribute, None)
    _named.clear()


def _name(module: Module, name: str) -> None:
    # A module that has no hooks any more keeps its name, and gets none again.
    if not _hooks or getattr(module, "names_hook", False) is True:
        return
    try:
        module.custom_name = name  # type: ignore[assignment]
        module.register_forward_pre_hook(_hooks[0])
        module.register_forward_hook(_hooks[1], always_call=True)
        module.names_hook = True  # type: ignore[assignment]
    except RuntimeError:  # a scripted module
        return
    _named[id(module)] = module


def name_on_setattr(before: Assign) -> Assign:
    """Wrap ``Module.__setattr__``."""

    @functools.wraps(before)
    def wrap_set_attr(self: Module, name: str, value: Any) -> None:
        if isinstance(value, Module):
            _name(value, name)
        before(self, name, value)

    return wrap_set_attr


def name_on_add_module(before: Assign) -> Assign:
    """Wrap ``Module.add_module``."""

    @functools.wraps(before)
    def wrap_add_module(self: Module, name: str, module: Any) -> None:
        if isinstance(module, Module):
            _name(module, name)
        before(self, name, module)

    return wrap_add_module
