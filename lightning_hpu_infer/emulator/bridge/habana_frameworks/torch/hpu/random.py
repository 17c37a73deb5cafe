"""The device's random state, apart from the host's."""

from collections.abc import Sequence
from typing import Any

import torch

from habana_frameworks.torch import _core_C
from habana_frameworks.torch.hpu._utils import _get_device_index

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

default_generators = [_core_C._get_default_generator()]


def _generator(device: Any = 0) -> Any:
    if (index := _get_device_index(device, optional=True)) != 0:
        raise RuntimeError(f"the random state is that of device 0, the only one of a process; got {index}")
    return default_generators[0]


def manual_seed(seed: int) -> Any:
    """Seed the device and return its generator."""
    return _generator().manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed the device."""
    manual_seed(seed)


def seed() -> int:
    """Seed the device from the system and return the seed."""
    return _generator().seed()


def seed_all() -> None:
    """Seed the device from the system."""
    seed()


def initial_seed() -> int:
    """Return the last seed."""
    return _generator().initial_seed()


def get_rng_state(device: Any = "hpu") -> torch.Tensor:
    """Return the state."""
    return _generator(device).get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "hpu") -> None:
    """Set the state."""
    _generator(device).set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    """Return the state of the one device."""
    return [get_rng_state()]


def set_rng_state_all(new_states: Sequence[torch.Tensor]) -> None:
    """Set the state of the one device."""
    if len(new_states) != 1:
        raise RuntimeError(f"a process has one device and one random state, got {len(new_states)} states")
    set_rng_state(new_states[0])
