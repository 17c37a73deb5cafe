"""Whether a graph's result is the plain forward's, up to rounding."""

from typing import Any

import torch
from torch import Tensor

from lightning_hpu_infer.signature import flatten

# How far a replay may be from the plain forward, relative to the largest value: rounding, not a wrong result.
_TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-3}
# What is allowed besides, relative to the largest value of all: cancellation leaves such noise in small columns.
_NOISE = 1e-2


def difference(output: Any, expected: Any) -> str:
    """How two results differ, or nothing. Waits for the device."""
    (leaves, structure), (others, other_structure) = flatten(output), flatten(expected)
    if structure != other_structure:
        return "its structure changes"
    for one, other in zip(leaves, others, strict=True):
        if not isinstance(one, Tensor):
            if one != other:
                return f"{one!r} instead of {other!r}"
            continue
        one, other = one.cpu(), other.cpu()
        if one.is_complex() and other.is_complex():
            one, other = torch.view_as_real(one), torch.view_as_real(other)
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{one.dtype}{list(one.shape)} instead of {other.dtype}{list(other.shape)}"
        tolerance = _TOLERANCES.get(one.dtype, 0.0)
        one, other = one.double(), other.double()
        sizes = other.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        scale = float(sizes.max()) if sizes.numel() else 0.0
        # By column of the last dimension: boxes of a thousand pixels must not hide scores below one.
        columns = sizes.reshape(-1, sizes.shape[-1]).amax(0) if sizes.numel() and sizes.dim() > 1 else sizes
        allowed = tolerance * (columns + sizes + _NOISE * scale)
        alike = (one == other) | (one.isnan() & other.isnan()) | ((one - other).abs() <= allowed)
        if not bool(alike.all()):
            return f"largest difference {float((one - other).abs().max()):.3g}, largest value {scale:.3g}"
    return ""
