"""Records tensors whose memory was replaced, unnoticed by the graphs that read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class DataReplacements:
    """Records which tensors were given other memory: `tensor.data = x`, `set_` and `swap_tensors`.

    The tensor object and its version stay the same then. A graph that was captured with it goes on reading the old
    memory, without an error (bridge 1.19 `tensor_impl.cpp`, `shallow_copy_from`).
    """

    def __init__(self) -> None:
        self.count = 0
        """Replacements so far, of any tensor."""
        self._latest: dict[int, int] = {}
        """Per tensor, by `id`, the count at its last replacement. An entry of a dead tensor only costs a capture."""

    def any_since(self, count: int, tensors: tuple[Any, ...]) -> bool:
        """Whether any of these tensors was given other memory after so many replacements."""
        return any(self._latest.get(id(tensor), 0) > count for tensor in tensors)

    def note(self, tensor: object) -> None:
        """Note that a tensor was given other memory."""
        self.count += 1
        self._latest[id(tensor)] = self.count

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record inside of this. Several objects may record at a time, and end in any order."""
        if not _watching:
            _replace_by_watched()
        _watching.append(self)
        try:
            yield
        finally:
            _watching.remove(self)
            if not _watching:
                _restore_unwatched()


_watching: list[DataReplacements] = []
_unwatched: dict[str, Any] = {}


def _note(tensor: object) -> None:
    for each in _watching:
        each.note(tensor)


class _WatchedData:
    """Stands in for the descriptor `torch.Tensor.data`."""

    def __get__(self, tensor: Tensor | None, kind: Any = None) -> Any:
        return self if tensor is None else _unwatched["data"].__get__(tensor, kind)

    def __set__(self, tensor: Tensor, value: Tensor) -> None:
        _note(tensor)
        _unwatched["data"].__set__(tensor, value)


def _watched_set(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    _note(tensor)
    return _unwatched["set_"](tensor, *args, **kwargs)  # type: ignore[no-any-return]


def _watched_swap(one: Tensor, other: Tensor) -> None:
    _note(one)
    _note(other)
    _unwatched["swap_tensors"](one, other)


def _replace_by_watched() -> None:
    """Patch torch, for all threads. `torch.Tensor` inherits both attributes, so deleting ours restores them."""
    _unwatched.update(data=torch.Tensor.data, set_=torch.Tensor.set_, swap_tensors=torch.utils.swap_tensors)
    torch.Tensor.data = _WatchedData()  # type: ignore[assignment]
    torch.Tensor.set_ = _watched_set  # type: ignore[assignment,method-assign]
    torch.utils.swap_tensors = _watched_swap


def _restore_unwatched() -> None:
    del torch.Tensor.data, torch.Tensor.set_
    torch.utils.swap_tensors = _unwatched["swap_tensors"]
    _unwatched.clear()
