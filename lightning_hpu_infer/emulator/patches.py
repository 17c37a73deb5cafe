"""Functions of torch that have to know the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from lightning_hpu_infer.emulator import runtime


def load_to_hpu(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch.load: a storage cannot be on the emulated device, so load to the host and move the tensors."""

    @functools.wraps(load)
    def load_both(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == "hpu":
            return _to_hpu(load(f, "cpu", *args, **kwargs))
        return load(f, map_location, *args, **kwargs)

    return load_both


def _to_hpu(value: Any) -> Any:
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(value.detach().to("hpu"), requires_grad=value.requires_grad)
    if isinstance(value, torch.Tensor):
        return value.detach().to("hpu").requires_grad_(value.requires_grad)
    if isinstance(value, torch.nn.Module):
        return value.to("hpu")
    if isinstance(value, dict):
        for key in value:
            value[key] = _to_hpu(value[key])
        return value
    if isinstance(value, list):
        return [_to_hpu(item) for item in value]
    if type(value) is tuple:
        return tuple(_to_hpu(item) for item in value)
    return value


def seed_both(manual_seed: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch.manual_seed: the bridge seeds its device too (bridge: torch_overwrites.py:131-257)."""

    @functools.wraps(manual_seed)
    def seed(value: Any) -> Any:
        if (rt := runtime.installed()) is not None and not runtime.is_forked():
            rt.seed(int(value))
        return manual_seed(value)

    return seed
