"""Bridges that break one assumption each: the emulator, with one thing of its public interface replaced."""

import contextlib
import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.verify.check import Mode

Patch = pytest.MonkeyPatch
Break = Callable[[Patch], object]
BREAKS: dict[str, tuple[Mode, Break]] = {}
"""By the name of the assumption: the mode, and what breaks it."""


def breaks(name: str, mode: Mode = "lazy") -> Callable[[Break], Break]:
    def register(function: Break) -> Break:
        BREAKS[name] = mode, function
        return function

    return register


def _hpu() -> Any:
    return torch.get_device_module("hpu")


def wraps_with(patch: Patch, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let graphs be what `make` makes of the bridge's own wrapper of a function."""
    original = _hpu().wrap_in_hpu_graph_func
    patch.setattr(_hpu(), "wrap_in_hpu_graph_func", lambda function, **options: make(original(function, **options)))


def frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns its first result whatever it is given."""
    results: list[Any] = []

    def call(*args: Any) -> Any:
        if not results:
            results.append(function(*args))
        return results[0]

    return call


def freeze(patch: Patch) -> None:
    wraps_with(patch, frozen)


@breaks("mode is as asked")
def _(patch: Patch) -> None:
    import habana_frameworks.torch.utils.internal as internal

    patch.setattr(internal, "is_lazy", lambda: False)


@breaks("one device per process")
def _(patch: Patch) -> None:
    patch.setattr(_hpu(), "device_count", lambda: 0)


@breaks("memory is counted in bytes")
def _(patch: Patch) -> None:
    original = _hpu().memory_stats

    def in_kilobytes(*args: Any) -> dict[str, int]:
        return {name: value // 1024 for name, value in original(*args).items()}

    patch.setattr(_hpu(), "memory_stats", in_kilobytes)


@breaks("inference tensors say so")
def _(patch: Patch) -> None:
    patch.setattr(Tensor, "is_inference", lambda tensor: False)


@breaks("addresses tell shared memory")
def _(patch: Patch) -> None:
    numbers = itertools.count(1)
    patch.setattr(type(torch.ones(1, device="hpu")), "data_ptr", lambda tensor: next(numbers))


@breaks("data can be replaced")
def _(patch: Patch) -> None:
    def copied(tensor: Tensor, value: Tensor) -> None:
        with torch.no_grad():
            tensor.copy_(value)

    patch.setattr(type(torch.ones(1, device="hpu")), "data", property(Tensor.detach, copied))


@breaks("threads can pin")
def _(patch: Patch) -> None:
    patch.setattr(Tensor, "pin_memory", lambda tensor, device: tensor)


@breaks("autocast casts linear layers")
def _(patch: Patch) -> None:
    patch.setattr(torch, "autocast", lambda *args: contextlib.nullcontext())


@breaks("naming hooks are recognised")
def _(patch: Patch) -> None:
    original = nn.Sequential.__init__

    def hooked(self: Any, *args: Any) -> None:
        original(self, *args)
        self.register_forward_hook(lambda *_: None)

    patch.setattr(nn.Sequential, "__init__", hooked)


def sources_are_lost(patch: Patch) -> None:
    """A pinned source of a copy that nobody waits for is written by another owner."""
    original = Tensor.to

    def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        if options.get("non_blocking") and tensor.device.type == "cpu" and tensor.is_pinned("hpu"):
            tensor.zero_()
        return original(tensor, *args, **options)

    patch.setattr(Tensor, "to", to)


breaks("pinned sources are kept until they are read")(sources_are_lost)


@breaks("integers arrive or raise")
def _(patch: Patch) -> None:
    original = Tensor.to
    patch.setattr(Tensor, "to", lambda tensor, device: original(tensor.int().long(), device))


@breaks("step markers launch")
def _(patch: Patch) -> None:
    import habana_frameworks.torch.core as core

    patch.setattr(core, "mark_step", lambda: None)


@breaks("reading waits for its producer only")
def _(patch: Patch) -> None:
    original = Tensor.cpu

    def late(tensor: Tensor) -> Tensor:
        _habana.synchronize()
        return original(tensor)

    patch.setattr(Tensor, "cpu", late)


class DoneAtOnce:
    """An event that covers nothing."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@breaks("events cover work and copies")
def _(patch: Patch) -> None:
    patch.setattr(_hpu(), "Event", DoneAtOnce)


@breaks("waiting lets threads run")
def _(patch: Patch) -> None:
    class KeepsTheLock(DoneAtOnce):
        def synchronize(self) -> None:
            ctypes.PyDLL(None).usleep(200_000)

    patch.setattr(_hpu(), "Event", KeepsTheLock)


def _copies_in(patch: Patch, order: Callable[[Tensor], Tensor]) -> None:
    """Copies to the host that nobody waits for arrive in another order."""
    original = Tensor.copy_

    def copy(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking and tensor.device.type == "cpu":
            source = order(source.cpu())
        return original(tensor, source, non_blocking)

    patch.setattr(Tensor, "copy_", copy)


@breaks("asynchronous outputs arrive")
def _(patch: Patch) -> None:
    _copies_in(patch, lambda source: torch.cat([source[:100], -torch.ones_like(source[100:])]))


@breaks("permuted outputs arrive flat")
def _(patch: Patch) -> None:
    _copies_in(patch, lambda source: source.flip(0))


for _name in ("replays read what they are given", "replays see writes to weights", "clones of views are inputs"):
    breaks(_name)(freeze)
breaks("replays draw new numbers")(freeze)


@breaks("outputs are overwritten by the next replay")
def _(patch: Patch) -> None:
    wraps_with(patch, lambda graph: lambda *args: [result.clone() for result in graph(*args)])


@breaks("clones of outputs last")
def _(patch: Patch) -> None:
    def late(graph: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what the call before gave."""
        before: list[Any] = []

        def call(*args: Any) -> Any:
            before.append([result.clone() for result in graph(*args)])
            return before[max(0, len(before) - 2)]

        return call

    wraps_with(patch, late)


@breaks("views are told")
def _(patch: Patch) -> None:
    from habana_frameworks.torch import _hpu_C

    patch.setattr(_hpu_C, "get_view_hash", lambda tensor: 0)


@breaks("failed captures can be reset")
def _(patch: Patch) -> None:
    patch.setattr(_habana, "reset_capture", lambda error: None)


@breaks("dropped graphs free their memory")
def _(patch: Patch) -> None:
    kept: list[Any] = []

    def leaking(graph: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            kept.append([result.clone() for result in graph(*args)])
            return graph(*args)

        return call

    wraps_with(patch, leaking)


def _compiles_with(patch: Patch, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    patch.setattr(torch, "compile", lambda function, **_: make(function))


@breaks("compiled functions are right", "eager")
def _(patch: Patch) -> None:
    _compiles_with(patch, lambda function: lambda x: [result * 1.5 for result in function(x)])


@breaks("compiled results last", "eager")
def _(patch: Patch) -> None:
    def static(function: Callable[..., Any]) -> Callable[..., Any]:
        result = frozen(torch.empty_like)
        return lambda x: result(x).copy_(function(x))

    _compiles_with(patch, static)


@breaks("eager ops are in order", "eager")
def _(patch: Patch) -> None:
    patch.setattr(Tensor, "add_", lambda tensor, value: tensor)
