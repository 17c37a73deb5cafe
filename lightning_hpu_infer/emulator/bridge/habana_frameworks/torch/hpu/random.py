"""The device's random state, apart from the host's."""

from collections.abc import Iterable
from typing import Any

import torch

from habana_frameworks.torch import _hpu_C

__all__ = [
    "get_rng_state",
    "get_rng_state_all",
    "initial_seed",
    "manual_seed",
    "manual_seed_all",
    "seed",
    "seed_all",
    "set_rng_state",
    "set_rng_state_all",
]


def manual_seed(seed: int) -> None:
    """Seed the device."""
    _hpu_C.manual_seed(int(seed))


manual_seed_all = manual_seed


def seed() -> None:
    """Seed the device from the system."""
    manual_seed(torch.Generator().seed())


seed_all = seed


def initial_seed() -> int:
    """Return the last seed."""
    return _hpu_C.initial_seed()


def get_rng_state(device: Any = "hpu") -> torch.Tensor:
    """Return the state."""
    return _hpu_C.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "hpu") -> None:
    """Set the state."""
    _hpu_C.set_rng_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    """Return the state of the one device."""
    return [get_rng_state()]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Set the state of the one device."""
    for state in new_states:
        set_rng_state(state)
