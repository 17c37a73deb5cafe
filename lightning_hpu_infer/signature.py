"""What must be equal for one captured graph to stand for two calls of a network."""

from collections import UserDict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

# Python values that mean the same in every call with an equal key.
CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class NotCapturable(Exception):
    """Raised when a call cannot be a graph: its message says why, for the warning."""


@dataclass(frozen=True)
class Structure:
    """How leaves are nested: torch's own spec, and the containers that torch takes for leaves.

    Dictionaries keep their order, since a network may iterate over them.
    """

    spec: TreeSpec
    opened: tuple[tuple[int, type, "Structure"], ...]
    """Per `UserDict` (such as `BatchEncoding`) or dataclass: its place among torch's leaves, type and contents."""

    @property
    def num_leaves(self) -> int:
        """Leaves, those of opened containers included."""
        return self.spec.num_leaves - len(self.opened) + sum(inner.num_leaves for _, _, inner in self.opened)

    def unflatten(self, leaves: list[Any]) -> Any:
        """The collection with these leaves."""
        if self.opened:
            rest, leaves = leaves, []
            for place, kind, inner in self.opened:
                before = place - len(leaves)
                contents = inner.unflatten(rest[before : before + inner.num_leaves])
                leaves += [*rest[:before], _closed(kind, contents)]
                rest = rest[before + inner.num_leaves :]
            leaves += rest
        return tree_unflatten(leaves, self.spec)


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a collection, and how they are nested."""
    outer, spec = tree_flatten(tree)
    leaves: list[Any] = []
    opened = []
    for place, leaf in enumerate(outer):
        if (contents := _contents(leaf)) is None:
            leaves.append(leaf)
            continue
        inner, structure = flatten(contents)
        leaves += inner
        opened.append((place, type(leaf), structure))
    return leaves, Structure(spec, tuple(opened))


def _contents(leaf: object) -> dict[str, Any] | None:
    """What a container holds; None for anything else, and for one with attributes besides, which would be lost."""
    names = set(getattr(leaf, "__dict__", ()))
    if isinstance(leaf, UserDict):
        # The others are what a tokenizer adds to its `BatchEncoding`, of no use to a network.
        return dict(leaf.data) if names <= {"data", "_encodings", "_n_sequences"} else None
    if is_dataclass(leaf) and not isinstance(leaf, type):
        contents = {each.name: getattr(leaf, each.name) for each in fields(leaf)}
        return contents if names <= contents.keys() else None
    return None


def _closed(kind: type, contents: dict[str, Any]) -> Any:
    if issubclass(kind, UserDict):
        return kind(contents)
    # Past `__init__`, which may take other arguments, and past frozen's `__setattr__`.
    instance = object.__new__(kind)
    for name, value in contents.items():
        object.__setattr__(instance, name, value)
    return instance


@dataclass(frozen=True)
class GraphKey:
    """Everything that must be equal for a captured graph to stand for a call.

    The bridge's own key leaves out dtype and stride and takes `1` for `True` and `-1` for `-2`
    (bridge `hpu/graphs.py`, `input_hash`), so each of our keys gets a bridge wrapper of its own.
    """

    leaves: tuple[Any, ...]
    """Per leaf of the arguments: shape, dtype and stride of a tensor; type and value of anything else."""

    modes: tuple[object, ...]
    """What else decides which ops are recorded: training, inference mode, autocast and its dtype."""

    structure: Structure = field(hash=False)
    """How the leaves were nested. Compared, but not hashed: torch's specs are not hashable."""

    @classmethod
    def of(
        cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str
    ) -> tuple["GraphKey", list[Any]]:
        """The key of a call and its flat arguments.

        Raises:
            NotCapturable: If a leaf is neither a tensor on the device nor a plain constant.
        """
        leaves, structure = flatten((args, kwargs))
        modes = (
            module.training,
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        )
        return cls(tuple(describe(leaf, device_type) for leaf in leaves), modes, structure), leaves

    @property
    def without_values(self) -> object:
        """The same for calls that differ in nothing but the values of Python arguments."""
        return tuple(leaf if isinstance(leaf, Layout) else leaf[0] for leaf in self.leaves), self.modes

    @property
    def values(self) -> tuple[object, ...]:
        """The Python arguments."""
        return tuple(leaf[1] for leaf in self.leaves if not isinstance(leaf, Layout))


@dataclass(frozen=True, slots=True)
class Layout:
    """All of a tensor that a recorded program depends on."""

    shape: torch.Size
    dtype: torch.dtype
    stride: tuple[int, ...]

    def with_rows(self, rows: int) -> "Layout":
        """The same with another first dimension; strides do not depend on it."""
        return Layout(torch.Size((rows, *self.shape[1:])), self.dtype, self.stride)


def layout(tensor: Tensor) -> Layout:
    """The layout of a tensor."""
    return Layout(tensor.shape, tensor.dtype, tensor.stride())


def describe(leaf: object, device_type: str) -> Layout | tuple[type, object]:
    """What a key holds of one argument.

    Raises:
        NotCapturable: If it is neither a tensor on the device nor a plain constant.
    """
    if isinstance(leaf, Tensor):
        if leaf.device.type != device_type:
            # Its copy to the device would not be part of the graph: every replay would see the first value.
            raise NotCapturable(f"it is given a tensor on {leaf.device}; give it tensors on the device")
        return layout(leaf)
    if isinstance(leaf, float | complex):
        return type(leaf), repr(leaf)  # 0.0 and -0.0 are equal, nan is not even equal to itself
    if isinstance(leaf, CONSTANTS):
        return type(leaf), leaf
    raise NotCapturable(f"it is given a {type(leaf).__name__}, which may change unseen; give it tensors or constants")


def without_tensors(leaves: list[Any]) -> tuple[list[Any], list[int]]:
    """The leaves with None for each tensor, and the tensors' places."""
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return [None if isinstance(leaf, Tensor) else leaf for leaf in leaves], places


def with_tensors(constants: list[Any], places: list[int], tensors: Iterable[Tensor]) -> list[Any]:
    """The inverse of `without_tensors`."""
    leaves = list(constants)
    for place, tensor in zip(places, tensors, strict=True):
        leaves[place] = tensor
    return leaves
