"""``torch.hpu``: device, streams, events, memory, random state, metrics and, in lazy mode, graphs."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from habana_frameworks.torch import _hpu_C
from habana_frameworks.torch.hpu._utils import _get_device_index
from habana_frameworks.torch.hpu.events import *  # noqa: F403
from habana_frameworks.torch.hpu.memory import *  # noqa: F403
from habana_frameworks.torch.hpu.metrics import *  # noqa: F403
from habana_frameworks.torch.hpu.random import *  # noqa: F403
from habana_frameworks.torch.hpu.streams import *  # noqa: F403
from habana_frameworks.torch.utils.internal import is_lazy

if is_lazy():  # in eager mode the names do not exist (bridge: hpu/__init__.py:45-46)
    from habana_frameworks.torch.hpu.graphs import *  # noqa: F403

# Switches, and what the C level tells without more ado.
device_count = _hpu_C.device_count
current_device = _hpu_C.current_device
synchronize = _hpu_C.synchronize_device
is_autocast_hpu_enabled = _hpu_C.is_autocast_hpu_enabled
set_autocast_hpu_enabled = _hpu_C.set_autocast_hpu_enabled
get_autocast_hpu_dtype = _hpu_C.get_autocast_hpu_dtype
set_autocast_hpu_dtype = _hpu_C.set_autocast_hpu_dtype
enable_dynamic_shape = _hpu_C.enable_dynamic_shape
disable_dynamic_shape = _hpu_C.disable_dynamic_shape
get_dynamic_shape_status = _hpu_C.get_dynamic_shape_status
enable_optim_output_sif = _hpu_C.enable_optim_output_sif
disable_optim_output_sif = _hpu_C.disable_optim_output_sif
enable_inference_mode = _hpu_C.enable_inference_mode
disable_inference_mode = _hpu_C.disable_inference_mode
enable_quantization = _hpu_C.enable_quantization
disable_quantization = _hpu_C.disable_quantization
enable_matmul3d_2d_reshape = _hpu_C.enable_matmul3d_2d_reshape
disable_matmul3d_2d_reshape = _hpu_C.disable_matmul3d_2d_reshape
enable_recompute_sdp = _hpu_C.enable_recompute_FSDPA
recompute_sdp_enabled = _hpu_C.is_recompute_FSDPA_enabled

# The star imports of the real package leak this name, and lightning-habana uses it (its resources.py:162).
hpu = sys.modules[__name__]


def init() -> None:
    """Acquire the device."""
    _hpu_C.init()


# PyTorch calls it before it makes a tensor on the device.
_lazy_init = init


def is_initialized() -> bool:
    """Tell whether the device was acquired."""
    return True


def is_available() -> bool:
    """Tell whether there is a device."""
    return device_count() > 0


is_bf16_supported = is_available


def set_device(device: Any) -> None:
    """Check the index; a process has one device, and the index is bookkeeping only."""
    index = _get_device_index(device, optional=True)
    if not 0 <= index < device_count():
        raise RuntimeError(f"invalid HPU index {index}; there are {device_count()} devices")


def get_device_name(device: Any = None) -> str:
    """Return the name of the emulated generation."""
    return _hpu_C.get_device_name(_get_device_index(device, optional=True))


def get_device_capability(device: Any = None) -> str:
    """Return the version of the (absent) driver."""
    return _hpu_C.get_device_capability()


def get_device_properties(device: Any = None) -> str:
    """Return addresses and sizes of memories as text."""
    return _hpu_C.get_device_properties(_get_device_index(device, optional=True))


def memory_usage(device: Any = None) -> int:
    """Return the bytes in use."""
    return memory_allocated(device)  # noqa: F405


def setDeterministic(val: bool) -> None:
    """Ask for kernels that give the same bits each time; deprecated."""
    _deprecated("setDeterministic", "torch.use_deterministic_algorithms")
    _hpu_C.setDeterministic(val)


def getDeterministic() -> bool:
    """Tell what `setDeterministic` was told; deprecated."""
    _deprecated("getDeterministic", "torch.are_deterministic_algorithms_enabled")
    return _hpu_C.getDeterministic()


def _deprecated(name: str, instead: str) -> None:
    warnings.warn(f"torch.hpu.{name} is deprecated; use {instead}", stacklevel=3)


@contextlib.contextmanager
def sdp_kernel(enable_recompute: bool = True) -> Iterator[dict[str, Any]]:
    """Choose inside the context how fused attention keeps what its backward needs."""
    before = recompute_sdp_enabled()
    enable_recompute_sdp(enable_recompute)
    try:
        yield {}
    finally:
        enable_recompute_sdp(before)


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
