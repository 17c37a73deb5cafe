"""Emulation of Habana's package of this name; see the README of ``lightning_hpu_infer.emulator``."""

__version__ = "0.0.0+emulator"
