"""Inference environment. The flags change nothing in the emulation: it has no const folding."""

import copy
import itertools
from typing import Any

import torch

from habana_frameworks.torch import _core_C, hpu
from habana_frameworks.torch.utils.internal import is_lazy

_const_ids = itertools.count()


def hpu_set_inference_env(model: torch.nn.Module | None = None) -> torch.nn.Module | None:
    """Prepare for inference; the real function returns a new, conv-bn-fused model, here a copy."""
    hpu.enable_inference_mode()
    hpu.enable_matmul3d_2d_reshape()
    return copy.deepcopy(model) if model is not None else None


def hpu_inference_initialize(
    model: torch.nn.Module | None = None,
    mark_only_scales_as_const: bool = False,
    optimizer: Any = None,
    args: Any = None,
) -> None:
    """Mark weights as constant."""
    hpu.enable_inference_mode()
    hpu.enable_matmul3d_2d_reshape()
    if model is not None and is_lazy():
        _mark_params_as_const(model, mark_only_scales_as_const)


def _mark_params_as_const(model: torch.nn.Module, only_scales: bool = False) -> None:
    for name, value in model.state_dict().items():
        if not only_scales or "scale" in name:
            meta = _core_C.get_tensor_extra_meta(value) or _core_C.get_new_tensor_extra_meta(value)
            meta.is_const_tensor = True
            if meta.const_id == -1:
                meta.const_id = next(_const_ids)


def _check_params_as_const(model: torch.nn.Module | None = None, only_scales: bool = False) -> None:
    """Read the marks, as the bridge does to see that they can be read."""
    for name, value in model.state_dict().items() if model is not None else ():
        if not only_scales or "scale" in name:
            _core_C.get_tensor_extra_meta(value).is_const_tensor  # noqa: B018 - raises where there is none


def hpu_teardown_inference_env() -> None:
    """Undo `hpu_set_inference_env`."""
    hpu.disable_inference_mode()
    hpu.disable_matmul3d_2d_reshape()


hpu_set_env = hpu_set_inference_env
hpu_initialize = hpu_inference_initialize
hpu_reset_env = hpu_teardown_inference_env
