"""Whether a graph gives the results of its plain ops, up to rounding."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hpu_infer.nested import tensors_in

# How far a result may be from the plain one, relative to the largest value: rounding, not a wrong result.
_TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-3}
# What is allowed besides, relative to the largest value of all: cancellation leaves such noise in small columns.
_NOISE = 1e-2


class Snapshot:
    """The memory that a graph writes to, as it is before a call, so that the graph can run twice.

    Args:
        tensors: The inputs that the graph writes to. Each is cloned.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._before = [tensor.clone() for tensor in self._tensors]

    def restore(self) -> None:
        """Undo what was written since."""
        for tensor, value in zip(self._tensors, self._before, strict=True):
            tensor.copy_(value)

    def compare(self, results: Any, plain: Callable[[], Any]) -> tuple[Any, str]:
        """Repeat a call with the plain ops, and compare results and written memory. Waits for the device.

        Args:
            results: The tensors, in any nesting, that the graph returned.
            plain: Runs the plain ops.

        Returns:
            What `plain` returned, and how the graph differs from it; empty if it does not.
        """
        # Results may be the memory that is restored here.
        found = [tensor.clone() for tensor in (*tensors_in(results), *self._tensors)]
        self.restore()
        expected = plain()
        return expected, difference(found, [*tensors_in(expected), *self._tensors])


def difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """How results differ, in words; empty if they do not. Waits for the device.

    Args:
        results: Tensors of any shape, dtype and device.
        expected: As many others.
    """
    return next(filter(None, map(_difference, results, expected)), "")


def _difference(one: Tensor, other: Tensor) -> str:
    one, other = one.cpu(), other.cpu()
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{one.dtype}{list(one.shape)} instead of {other.dtype}{list(other.shape)}"
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    tolerance = _TOLERANCES.get(one.dtype, 0.0)
    one, other = one.double(), other.double()
    sizes = other.abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scale = float(sizes.max()) if sizes.numel() else 0.0
    # By column of the last dimension: boxes of a thousand pixels must not hide scores below one.
    columns = sizes.reshape(-1, sizes.shape[-1]).amax(0) if sizes.numel() and sizes.dim() > 1 else sizes
    allowed = tolerance * (columns + sizes + _NOISE * scale)
    alike = (one == other) | (one.isnan() & other.isnan()) | ((one - other).abs() <= allowed)
    if bool(alike.all()):
        return ""
    return f"largest difference {float((one - other).abs().max()):.3g}, largest value {scale:.3g}"
