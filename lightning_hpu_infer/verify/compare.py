"""How far predictions are from others."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hpu_infer.nested import tensors_in
from lightning_hpu_infer.verify.check import Broken

# Relative to the largest value of a tensor. The device rounds products otherwise than the CPU.
CPU_TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
# What a compiler that fuses ops otherwise may change.
DEVICE_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Distance:
    """How far two runs' predictions are from each other.

    Args:
        largest: The largest difference of two elements.
        scale: The largest element of the tensor that has it.
    """

    largest: float = 0.0
    scale: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether all elements are equal."""
        return self.largest == 0

    def __str__(self) -> str:
        return (
            "equal bit for bit"
            if self.equal
            else f"up to {self.largest:.2g} away, where values are up to {self.scale:.2g}"
        )


def distance(found: Any, expected: Any, tolerances: dict[torch.dtype, float], whose: str) -> Distance:
    """How far predictions are from those that are expected.

    Args:
        found: Host tensors of any dtype in any nesting, such as what `predict` returned.
        expected: Others.
        tolerances: What is allowed, per dtype, relative to the largest value of a tensor. Other dtypes must be equal.
        whose: Whose predictions are expected, for the message.

    Raises:
        Broken: If they are too far, or of another kind.
    """
    ours, theirs = list(tensors_in(found)), list(tensors_in(expected))
    if len(ours) != len(theirs):
        raise Broken(f"{len(ours)} tensors instead of {whose} {len(theirs)}")
    worst = Distance()
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise Broken(f"tensor {number}: {_kind(one)} instead of {whose} {_kind(other)}")
        here = _distance(one.double(), other.double())
        if not here.largest <= tolerances.get(one.dtype, 0.0) * here.scale:
            raise Broken(f"tensor {number} of {len(ours)}, {_kind(one)}: {here} from {whose}")
        worst = max(worst, here, key=lambda each: each.largest / (each.scale or 1))
    return worst


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _distance(one: Tensor, other: Tensor) -> Distance:
    if not one.numel():
        return Distance()
    gap = torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, (one - other).abs())
    return Distance(float(gap.nan_to_num(nan=float("inf")).max()), float(other.abs().nan_to_num().max()))
