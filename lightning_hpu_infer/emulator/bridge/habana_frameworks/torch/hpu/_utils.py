"""Device arguments."""

from typing import Any

import torch


def _get_device_index(device: Any, optional: bool = False, allow_cpu: bool = False) -> int:
    """Return the index that `device` (an index, a name or a ``torch.device``) means; -1 for a CPU that is allowed."""
    if isinstance(device, int):
        return device
    where = torch.device(device) if isinstance(device, str) else device
    if isinstance(where, torch.device):
        if where.type == "cpu" and allow_cpu:
            return -1
        if where.type != "hpu":
            raise ValueError(f"Expected a hpu {'or cpu ' if allow_cpu else ''}device, but got: {where}")
        if where.index is not None:
            return where.index
    if not optional:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
    return 0  # a process has one device
