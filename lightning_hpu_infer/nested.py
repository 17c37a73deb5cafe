"""Nested collections, as batches and outputs are: what they hold, and copies that hold something else."""

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any


def parts_of(data: Any) -> dict[Any, Any] | None:
    """What a collection holds, by key, field or index. None for anything else."""
    if isinstance(data, Mapping):
        return dict(data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return dict(zip(data._fields, data, strict=True))
    if isinstance(data, list | tuple):
        return dict(enumerate(data))
    if is_dataclass(data) and not isinstance(data, type):
        return {f.name: getattr(data, f.name) for f in fields(data)}
    return None


def with_parts(data: Any, parts: dict[Any, Any]) -> Any:
    """A collection of the same type that holds other parts under the same names."""
    if isinstance(data, tuple) and hasattr(data, "_make"):
        return data._make(parts.values())
    if isinstance(data, list | tuple):
        return type(data)(parts.values())
    if isinstance(data, Mapping) and not isinstance(data, MutableMapping):
        return type(data)(parts)  # type: ignore[call-arg]
    # A copy keeps what is no part: the encodings of a `BatchEncoding`, a default factory.
    data = copy.copy(data)
    for name, part in parts.items():
        if isinstance(data, MutableMapping):
            data[name] = part
        else:
            object.__setattr__(data, name, part)  # the dataclass may be frozen
    return data
