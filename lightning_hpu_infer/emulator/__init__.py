"""A CPU emulation of Habana's PyTorch bridge: the device "hpu" and ``habana_frameworks``, on request.

Nothing changes on import; `install` does it and `uninstall` undoes it.
"""

from lightning_hpu_infer.emulator.config import EmulatorConfig, EmulatorStats
from lightning_hpu_infer.emulator.lifecycle import install, is_installed, paused, reset_stats, stats, uninstall

__all__ = [
    "EmulatorConfig",
    "EmulatorStats",
    "install",
    "is_installed",
    "paused",
    "reset_stats",
    "stats",
    "uninstall",
]
