"""Recipes of fp8 scaling."""

from typing import Any


class DelayedScaling:
    """Stores its options."""

    def __init__(self, **options: Any) -> None:
        self.__dict__.update(options)
