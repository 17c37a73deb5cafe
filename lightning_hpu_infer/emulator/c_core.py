"""The names of Habana's C extension module ``_core_C``: step markers, the random generator, marks on tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from lightning_hpu_infer.emulator import runtime
from lightning_hpu_infer.emulator.tensor import HpuTensor


def _hb_get_default_device() -> int:
    return 0


def _mark_step(device_str: str = "", sync: bool = False) -> None:
    """Launch what is pending; launches are done when this returns, so `sync` has nothing to wait for."""
    rt = runtime.current()
    rt.touch()
    rt.counters.add("mark_steps")
    rt.notify("mark_step")
    rt.flush("mark_step")


def _iter_mark_step() -> None:
    """Start to number graphs anew, which shows in a debugger only; nothing is launched (bridge: IterStepMarker)."""
    runtime.current().touch()


class _Generator:
    """The device's random state, in order with the ops that draw from it."""

    def manual_seed(self, seed: int) -> _Generator:
        runtime.current().seed(seed)
        return self

    def seed(self) -> int:
        seed = torch.Generator().seed()
        self.manual_seed(seed)
        return seed

    def initial_seed(self) -> int:
        return self._idle().initial_seed()

    def get_state(self) -> torch.Tensor:
        return self._idle().get_state()

    def set_state(self, state: torch.Tensor) -> None:
        self._idle().set_state(state)

    def _idle(self) -> torch.Generator:
        rt = runtime.current()
        rt.synchronize()
        return rt.generator


_generator = _Generator()


def _get_default_generator() -> _Generator:
    return _generator


class TensorExtraMeta:
    """What the bridge knows of a tensor besides its contents; here nothing is folded that is marked constant."""

    def __init__(self) -> None:
        self.is_const_tensor = False
        self.const_id = -1


_metas = WeakIdKeyDictionary()


def _key(tensor: torch.Tensor) -> object:
    return tensor._cell if isinstance(tensor, HpuTensor) else tensor


def get_new_tensor_extra_meta(tensor: torch.Tensor) -> TensorExtraMeta:
    """Return marks for a tensor that has none yet."""
    if _key(tensor) in _metas:
        raise RuntimeError("Cannot create a new backend meta as one already exists")
    meta = _metas[_key(tensor)] = TensorExtraMeta()
    return meta


def get_tensor_extra_meta(tensor: torch.Tensor) -> TensorExtraMeta | None:
    """Return the marks of a tensor; None if it has none."""
    find: Any = _metas.get  # untyped
    return find(_key(tensor))  # type: ignore[no-any-return]
