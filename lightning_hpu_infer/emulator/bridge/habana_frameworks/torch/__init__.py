"""The bridge's package: ``hpu``, ``core``, ``utils``, ``distributed``."""

import importlib

from habana_frameworks.torch.utils import internal

is_torch_fork = False
"""Whether PyTorch is Habana's build."""

_SUBPACKAGES = ("core", "distributed", "hpex", "hpu", "utils")


def __getattr__(name: str) -> object:
    # The real package imports its parts eagerly; here they refer to each other while they load.
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["internal", "is_torch_fork"]
