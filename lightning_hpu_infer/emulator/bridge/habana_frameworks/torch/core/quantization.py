"""Inference environment. The flags change nothing in the emulation: it has no const folding."""

from typing import Any

import torch


def hpu_set_inference_env(model: torch.nn.Module | None = None) -> torch.nn.Module | None:
    """Prepare for inference; the real function returns a new, conv-bn-fused model, here a copy."""
    import copy

    return copy.deepcopy(model) if model is not None else None


def hpu_inference_initialize(
    model: torch.nn.Module | None = None,
    mark_only_scales_as_const: bool = False,
    optimizer: Any = None,
    args: Any = None,
) -> None:
    """Mark weights as constant."""


def hpu_teardown_inference_env() -> None:
    """Undo `hpu_set_inference_env`."""


hpu_set_env = hpu_set_inference_env
hpu_initialize = hpu_inference_initialize
hpu_reset_env = hpu_teardown_inference_env
