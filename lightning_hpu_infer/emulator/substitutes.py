"""Ops that the CPU's kernels refuse where a device's do not, in terms of other ops."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from lightning_hpu_infer.emulator.runtime import Runtime
from lightning_hpu_infer.emulator.tensor import HANDLERS, HpuTensor, run

aten = torch.ops.aten


def _pack_padded_sequence(
    rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    padded, lengths, batch_first = args
    if isinstance(lengths, HpuTensor):
        raise RuntimeError(
            f"'lengths' argument should be a 1D CPU int64 tensor, but got {lengths.dim()}D {lengths.device} tensor"
        )
    # PyTorch's kernel checks the lengths and counts the rows of each step, which it can do without the values.
    twin = torch.empty(padded.shape[:2], device="cpu").unsqueeze(-1)
    rows: torch.Tensor = func(twin, lengths, batch_first)[1]
    rt.note_host_work()
    steps = padded.transpose(0, 1) if batch_first else padded
    return torch.cat([steps[step, :count] for step, count in enumerate(rows.tolist())]), rows


def _histc(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    values: torch.Tensor = args[0]
    if values.is_floating_point():
        return run(rt, func, args, kwargs)  # type: ignore[no-any-return]
    counts: torch.Tensor = run(rt, func, (values.double(), *args[1:]), kwargs)
    return counts.to(values.dtype)


def _complex(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    # The device has no complex numbers (bridge: habana_kernels/lazy_kernels.cpp:2040-2042, and the same in eager mode).
    real, imaginary = (part.detach().cpu() for part in args)
    return torch.complex(real, imaginary)


def _index_copy_(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor, dim, index, source = args
    if isinstance(source, HpuTensor) and source._cell is tensor._cell:
        source = source.clone()  # which the CPU's kernel leaves to its caller
    return run(rt, func, (tensor, dim, index, source), kwargs)  # type: ignore[no-any-return]


HANDLERS[aten._pack_padded_sequence.default] = _pack_padded_sequence
HANDLERS[aten.histc.default] = _histc
HANDLERS[aten.complex.default] = _complex
HANDLERS[aten.index_copy_.default] = _index_copy_
