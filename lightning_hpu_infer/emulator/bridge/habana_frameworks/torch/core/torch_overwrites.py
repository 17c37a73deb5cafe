"""The hooks that lazy mode puts on every child module, so that ops carry the name of the module that called them.

The names are for debugging and change no result. What registers the hooks is the emulator's `naming`.
"""

import threading
from typing import Any

import torch

from habana_frameworks.torch.utils import debug

_lock = threading.Lock()
_name_stack: list[str] = []
"""Paths of the modules that run now, of all threads together as on the bridge."""


def _pre_fwd_hook(module: torch.nn.Module, input: Any) -> None:
    with _lock:
        name = str(module.custom_name)
        path = f"{_name_stack[-1]}/{name}" if _name_stack else name
        _name_stack.append(path)
        debug._set_module_name(path)


def _post_fwd_hook(module: torch.nn.Module, input: Any, output: Any) -> None:
    with _lock:
        if _name_stack:  # empty if the call was refused before the other hook ran
            _name_stack.pop()
        debug._set_module_name(_name_stack[-1] if _name_stack else "")
