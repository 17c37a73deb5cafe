"""The cache key of captured and compiled graphs."""

from typing import Any, NamedTuple


class Key(NamedTuple):
    """What distinguishes calls of one traced graph, besides the weights."""

    numbers: tuple[Any, ...] = ()
    """The Python numbers among its inputs."""
    tensors: tuple[tuple[Any, ...], ...] = ()
    """Shape, strides and dtype of each tensor that changes from call to call: `_torch.tensor_description`."""
    host_values: int = 0
    """Which set of values the host tensors among its inputs have; 0 if there are none."""
