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


def seed_both_randomly(seed: Callable[[], int]) -> Callable[[], int]:
    """Wrap torch.seed likewise (bridge: torch_overwrites.py:485-497)."""

    @functools.wraps(seed)
    def seed_both_() -> int:
        value = seed()
        if (rt := runtime.installed()) is not None and not runtime.is_forked():
            rt.seed(value)
        return value

    return seed_both_


def fork_rng_on_hpu(fork_rng: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap torch.random.fork_rng: the device is by default this one (bridge: torch_overwrites.py:363-382)."""

    @functools.wraps(fork_rng)
    def fork(
        devices: Any = None,
        enabled: bool = True,
        _caller: str = "fork_rng",
        _devices_kw: str = "devices",
        device_type: str | None = None,
    ) -> Any:
        return fork_rng(devices, enabled, _caller, _devices_kw, device_type or "hpu")

    return fork


def record_on_hpu(record_stream: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Tensor.record_stream, which takes PyTorch's streams only (bridge: torch_overwrites.py:158-171)."""

    @functools.wraps(record_stream)
    def record(tensor: torch.Tensor, stream: Any) -> None:
        # Memory here lives as long as work on it does.
        if tensor.device.type != "hpu":
            record_stream(tensor, stream)

    return record
