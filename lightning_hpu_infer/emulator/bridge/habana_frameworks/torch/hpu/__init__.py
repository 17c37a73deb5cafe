"""``torch.hpu``: device, streams, events, memory, random state, metrics and, in lazy mode, graphs."""

import sys
import types
from typing import Any

import torch

from habana_frameworks.torch import _hpu_C
from habana_frameworks.torch.hpu.events import *  # noqa: F403
from habana_frameworks.torch.hpu.memory import *  # noqa: F403
from habana_frameworks.torch.hpu.metrics import *  # noqa: F403
from habana_frameworks.torch.hpu.random import *  # noqa: F403
from habana_frameworks.torch.hpu.streams import *  # noqa: F403
from habana_frameworks.torch.utils.internal import is_lazy

if is_lazy():  # in eager mode the names do not exist (bridge: hpu/__init__.py:45-46)
    from habana_frameworks.torch.hpu.graphs import *  # noqa: F403

# The star imports of the real package leak this name, and lightning-habana uses it (its resources.py:162).
hpu = sys.modules[__name__]


def init() -> None:
    """Acquire the device."""


# PyTorch calls it before it makes a tensor on the device.
_lazy_init = init


def is_initialized() -> bool:
    """Tell whether the device was acquired."""
    return True


def is_available() -> bool:
    """Tell whether there is a device."""
    return True


def is_bf16_supported() -> bool:
    """Tell whether bfloat16 works."""
    return True


def device_count() -> int:
    """Return the number of devices."""
    return _hpu_C.device_count()


def current_device() -> int:
    """Return 0: a process has one device, with any module id."""
    return 0


def set_device(device: Any) -> None:
    """Check the index; a process has one device, and the index is bookkeeping only."""
    index = torch.device(device).index if isinstance(device, (str, torch.device)) else int(device)
    if index is not None and not 0 <= index < device_count():
        raise RuntimeError(f"invalid HPU index {index}; there are {device_count()} devices")


def get_device_name(device: Any = None) -> str:
    """Return the name of the emulated generation."""
    return _hpu_C.DEVICE_NAME


def get_device_capability(device: Any = None) -> str:
    """Return the version of the (absent) driver."""
    return "0.0.0"


def get_device_properties(device: Any = None) -> types.SimpleNamespace:
    """Return name and memory size."""
    return types.SimpleNamespace(
        name=_hpu_C.DEVICE_NAME, total_memory=_hpu_C.MEMORY_LIMIT, sDramSize=_hpu_C.MEMORY_LIMIT
    )


def synchronize() -> None:
    """Launch what is pending and wait for the device."""
    _hpu_C.synchronize_device()


def is_autocast_hpu_enabled() -> bool:
    """Tell whether autocast is on."""
    return torch.is_autocast_enabled("hpu")


def set_autocast_hpu_enabled(enabled: bool) -> None:
    """Switch autocast."""
    torch.set_autocast_enabled("hpu", enabled)


def get_autocast_hpu_dtype() -> torch.dtype:
    """Return autocast's dtype."""
    return torch.get_autocast_dtype("hpu")


def set_autocast_hpu_dtype(dtype: torch.dtype) -> None:
    """Set autocast's dtype."""
    torch.set_autocast_dtype("hpu", dtype)


def _is_in_bad_fork() -> bool:
    return False


class device:
    """Context manager of the device index; a process has one device."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __enter__(self) -> None:
        set_device(self.device if self.device is not None else 0)

    def __exit__(self, *exc: object) -> None:
        return None
