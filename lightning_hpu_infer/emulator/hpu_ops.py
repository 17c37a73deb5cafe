"""Ops of the namespace ``torch.ops.hpu`` that inference code calls, in terms of PyTorch's.

Schemas and meanings are those of the bridge's release 1.19 (``habana_kernels/kernels_register.cpp``,
``scripts/hpu_op.yaml``, and its tests of each op). A kernel computes on host tensors in a device thread, and on `meta`
to find out the layout of its result, so no kernel reads values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_BEAMS = 4
"""Beams whose indices, of two bits each, are in one byte of ``beam_idx``."""


def _plain_index(self: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
    return self[tuple(indices)]


def _exp(self: torch.Tensor) -> torch.Tensor:
    return torch.exp(self)


def _sqrt(self: torch.Tensor) -> torch.Tensor:
    return torch.sqrt(self)


def _rsqrt(self: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(self)


def _scaled_masked_softmax(input: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.softmax(input * scale + mask, -1)


def _lower_triangle(scores: torch.Tensor) -> torch.Tensor:
    """Return what each row may look at; fewer rows than columns are the last rows of a square."""
    rows, columns = scores.shape[-2:]
    return torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril(columns - rows)


def _masked(self: torch.Tensor, scale: float, allowed: torch.Tensor) -> torch.Tensor:
    return torch.where(allowed, self * scale, torch.finfo(self.dtype).min)


def _scaled_triangular_softmax(
    self: torch.Tensor,
    inv_scale_attn: float,
    exp_sum_recpr: torch.Tensor | None = None,
    max: torch.Tensor | None = None,
) -> torch.Tensor:
    scores = _masked(self, inv_scale_attn, _lower_triangle(self))
    if exp_sum_recpr is None or max is None:
        return torch.softmax(scores, -1)
    return torch.exp(scores - max) * exp_sum_recpr


def _scaled_triangular_softmax_retain(
    self: torch.Tensor, inv_scale_attn: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = _masked(self, inv_scale_attn, _lower_triangle(self))
    largest = scores.amax(-1, keepdim=True)
    factor = torch.exp(scores - largest).sum(-1, keepdim=True).reciprocal()
    return torch.exp(scores - largest) * factor, factor, largest


def _scaled_masked_triangular_softmax(
    self: torch.Tensor,
    start_end: torch.Tensor,
    inv_scale_attn: float,
    grouped_batch_size: int,
    use_max: bool,
    mode: int,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    # `use_max` and `mode` choose between faster and more exact kernels of the device.
    bounds = start_end.reshape(-1, 2).repeat_interleave(grouped_batch_size, 0, output_size=self.shape[0])
    columns = torch.arange(self.shape[-1], device=self.device)
    inside = (columns >= bounds[:, :1]) & (columns < bounds[:, 1:])
    allowed = _lower_triangle(self) & inside.unsqueeze(1)
    result = torch.softmax(_masked(self, inv_scale_attn, allowed), -1)
    return torch.where(allowed.any(-1, keepdim=True), result, 0.0).to(out_dtype or self.dtype)


def _kv_reorder_(self: torch.Tensor, start: torch.Tensor, end: torch.Tensor, beam_idx: torch.Tensor) -> torch.Tensor:
    # Bits are moved, so that float8 needs no arithmetic of its own.
    cache = self.view(torch.uint8) if self.dtype.itemsize == 1 else self
    shifts = torch.arange(2 * _BEAMS - 2, -1, -2, device=self.device)
    beams = (beam_idx.unsqueeze(1).long() >> shifts) & (_BEAMS - 1)
    rows = torch.arange(self.shape[0], device=self.device).unsqueeze(1)
    positions = torch.arange(self.shape[-2], device=self.device)
    inside = (positions >= start.unsqueeze(1)) & (positions < end.unsqueeze(1))
    inside = inside.reshape(self.shape[0], *[1] * (self.dim() - 3), self.shape[-2], 1)
    cache.copy_(torch.where(inside, cache[rows, beams], cache))
    return self


def _in_place_interleave_(self: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(self.shape[0], device=self.device) // _BEAMS
    values = self.view(torch.uint8) if self.dtype.itemsize == 1 else self
    values.copy_(values.index_select(0, rows))
    return self


_OPS: dict[str, Callable[..., Any]] = {
    "plain_index(Tensor self, Tensor[] indices) -> Tensor": _plain_index,
    "exp_fast_math(Tensor self) -> Tensor": _exp,
    "sqrt_fast_math(Tensor self) -> Tensor": _sqrt,
    "rsqrt_fast_math(Tensor self) -> Tensor": _rsqrt,
    "scaled_masked_softmax(Tensor input, Tensor mask, float scale) -> Tensor": _scaled_masked_softmax,
    "scaled_triangular_softmax(Tensor self, float inv_scale_attn, Tensor? exp_sum_recpr=None, Tensor? max=None)"
    " -> Tensor": _scaled_triangular_softmax,
    "scaled_triangular_softmax_retain(Tensor self, float inv_scale_attn)"
    " -> (Tensor, Tensor, Tensor)": _scaled_triangular_softmax_retain,
    "scaled_masked_triangular_softmax(Tensor self, Tensor start_end, float inv_scale_attn, int grouped_batch_size,"
    " bool use_max, int mode, ScalarType? out_dtype=None) -> Tensor": _scaled_masked_triangular_softmax,
    "kv_reorder_(Tensor(a!) self, Tensor start, Tensor end, Tensor beam_idx) -> Tensor(a!)": _kv_reorder_,
    "in_place_interleave_(Tensor(a!) self) -> Tensor(a!)": _in_place_interleave_,
}


def define(library: Any) -> None:
    """Define the ops in a ``torch.library.Library`` of the namespace ``hpu``."""
    for schema, kernel in _OPS.items():
        library.define(schema)
        library.impl(schema.partition("(")[0], kernel, "CompositeExplicitAutograd")
