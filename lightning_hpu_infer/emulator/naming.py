"""Lazy mode names every module by the attribute that it is assigned to, with hooks (bridge: torch_overwrites.py)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

Module = torch.nn.Module
Hook = Callable[..., None]


class Namer:
    """Registers the hooks on each module once, and can take them off again."""

    def __init__(self, pre_hook: Hook, post_hook: Hook) -> None:
        self._hooks = (pre_hook, post_hook)
        self._named: weakref.WeakValueDictionary[int, Module] | None = weakref.WeakValueDictionary()
        """By id, since a module may compare by value; None once undone."""

    def name(self, module: Module, name: str) -> None:
        """Name `module`, unless it has a name."""
        if self._named is None or getattr(module, "names_hook", False) is True:
            return
        try:
            module.custom_name = name  # type: ignore[assignment]
            module.register_forward_pre_hook(self._hooks[0])
            module.register_forward_hook(self._hooks[1], always_call=True)
            module.names_hook = True  # type: ignore[assignment]
        except RuntimeError:  # a scripted module
            return
        self._named[id(module)] = module

    def undo(self) -> None:
        """Take the hooks off the modules that live; copies of them keep theirs, which do no harm."""
        named, self._named = self._named, None
        for module in list((named or {}).values()):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook in self._hooks]:
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
            for attribute in ("custom_name", "names_hook"):
                vars(module).pop(attribute, None)

    def setattr(self, before: Callable[[Module, str, Any], None]) -> Callable[[Module, str, Any], None]:
        """Wrap ``Module.__setattr__``."""
        name_child = self.name

        @functools.wraps(before)
        def wrap_set_attr(self: Module, name: str, value: Any) -> None:
            if isinstance(value, Module):
                name_child(value, name)
            before(self, name, value)

        return wrap_set_attr

    def add_module(self, before: Callable[[Module, str, Any], None]) -> Callable[[Module, str, Any], None]:
        """Wrap ``Module.add_module``."""
        name_child = self.name

        @functools.wraps(before)
        def wrap_add_module(self: Module, name: str, module: Any) -> None:
            if isinstance(module, Module):
                name_child(module, name)
            before(self, name, module)

        return wrap_add_module
