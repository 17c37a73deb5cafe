"""A timeline of what the emulated device did. The real bridge has no such module: its absence tells them apart."""

from lightning_hpu_infer.emulator.lifecycle import start_timeline as start
from lightning_hpu_infer.emulator.lifecycle import stop_timeline as stop

__all__ = ["start", "stop"]
