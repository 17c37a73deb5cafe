"""A CPU emulation of Habana's PyTorch bridge: the device "hpu" and ``habana_frameworks``, on request.

Nothing changes on import; `install` does it and `uninstall` undoes it.
"""

from lightning_hpu_infer.emulator.config import EmulatorConfig, EmulatorStats
from lightning_hpu_infer.emulator.lifecycle import (
    install,
    is_installed,
    paused,
    reset_stats,
    start_timeline,
    stats,
    stop_timeline,
    uninstall,
)
from lightning_hpu_infer.emulator.timeline import DeviceSpan

__all__ = [
    "DeviceSpan",
    "EmulatorConfig",
    "EmulatorStats",
    "install",
    "is_installed",
    "paused",
    "reset_stats",
    "start_timeline",
    "stats",
    "stop_timeline",
    "uninstall",
]
