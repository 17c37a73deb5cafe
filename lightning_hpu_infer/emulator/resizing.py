"""Device memory that grows in place: ``resize_``, and outputs that an op resizes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from lightning_hpu_infer.emulator.plan import Plan, Slot
from lightning_hpu_infer.emulator.runtime import Runtime
from lightning_hpu_infer.emulator.storage import Spec, poison


def _extent(spec: Spec) -> int:
    """Return how many elements of its memory a layout reaches."""
    if not spec.numel:
        return 0
    return spec.offset + 1 + sum((size - 1) * stride for size, stride in zip(spec.size, spec.stride, strict=True))


def _flat(memory: torch.Tensor) -> torch.Tensor:
    return memory.as_strided((_extent(Spec.of(memory)),), (1,), 0)


@cache
def _growth(old: Spec, new: Spec) -> Plan:
    """Plan the move of memory into larger memory; what is added is not defined."""

    def grow(memory: torch.Tensor) -> torch.Tensor:
        grown = poison(new.empty(), loud=False)
        kept = _flat(memory)
        _flat(grown)[: kept.numel()].copy_(kept)
        return grown

    plan = Plan(grow, (Slot(0),), {}, (None,), ())
    plan.outputs, plan.new, plan.computes = [new], ((0, new),), False
    return plan


def resize(rt: Runtime, tensor: Any, spec: Spec) -> None:
    """Give an `HpuTensor` another layout of the same dtype, with more memory where it needs that.

    All that share its memory see the same elements as before.
    """
    cell = tensor._cell
    base = cell.spec
    needed = -(-_extent(spec) * spec.dtype.itemsize // base.dtype.itemsize)
    if needed > _extent(base):
        whole = tensor._spec is base and not spec.offset
        grown = spec if whole else Spec.get(base.dtype, (needed,), (1,))
        made = rt.enqueue(_growth(base, grown), [cell])[0]
        cell.spec, cell.storage = grown, made.storage
    tensor._set_layout(spec)
