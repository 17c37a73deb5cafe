"""The plugin's flags as one frozen value that is passed down whole."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """What `HPUInferenceAccelerator` was asked to do. Each technique is one flag; the rest are its options.

    Raises:
        TypeError: If a flag is not a bool or a number is not an int.
        ValueError: If a number is out of its range.
    """

    hpu_graphs: bool = True
    """Capture the networks that `predict_step` calls as HPU graphs and replay them."""

    async_copy: bool = True
    """Stage inputs in pinned host memory, so that their copy to the device does not hold up the host."""

    pipelining: bool = True
    """Prepare later batches in a thread and fetch a batch's output only after later batches were launched."""

    prefetch: int = 2
    """Batches that the host prepares ahead. 0 prepares each batch when it is needed. Used when `pipelining`."""

    in_flight: int = 1
    """Batches whose output may wait on the device while a later one is launched. Used when `pipelining`."""

    defer_hooks: bool = True
    """Run the end hooks of a batch when its output has arrived, with host tensors. `False` keeps stock Lightning's
    hook order and device tensors and delays only the stored predictions. Used when `pipelining`."""

    max_graphs: int = 16
    """Captured graphs per network; further input shapes run without a graph. Used when `hpu_graphs`."""

    verify_graphs: int = 1
    """Replays of each new graph that are compared with the plain forward, besides the capturing call. 0 believes every
    graph. Used when `hpu_graphs`."""

    def __post_init__(self) -> None:
        for name in ("hpu_graphs", "async_copy", "pipelining", "defer_hooks"):
            _check_type(name, getattr(self, name), bool)
        for name, low, high in (
            ("prefetch", 0, 1024),
            ("in_flight", 0, 1024),
            ("max_graphs", 1, 65536),
            ("verify_graphs", 0, 65536),
        ):
            _check_range(name, getattr(self, name), low, high)


def _check_type(name: str, value: object, expected: type) -> None:
    # bool is an int to Python, not to a user: `prefetch=True` is a mistake.
    if type(value) is not expected:
        raise TypeError(f"`{name}` must be of type {expected.__name__}, got {value!r}.")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    _check_type(name, value, int)
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be from {low} to {high}, got {value}.")
