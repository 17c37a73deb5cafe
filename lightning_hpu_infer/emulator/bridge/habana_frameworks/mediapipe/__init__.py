"""The media pipeline; lightning-habana imports its names, the emulator has no media engine."""

from typing import Any


def placeholder(name: str) -> type:
    """Make a class that can be derived from and not used."""
    if name.startswith("__"):
        raise AttributeError(name)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"{name} of Habana's media pipeline is not emulated; use a plain DataLoader")

    return type(name, (), {"__init__": __init__})


class fn:
    """Operators."""
