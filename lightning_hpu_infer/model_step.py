"""What a pipeline runs on each batch: any module, or a LightningModule as a Trainer would run it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lightning_hpu_infer._lightning import has_stock_transfer
from lightning_hpu_infer.hooks import uses_dataloader_iter

Model = nn.Module | Callable[[], nn.Module]
Autocast = Literal["32-true", "bf16-mixed", "16-mixed"]
_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class ModelStep(NamedTuple):
    """A model on its device, and what is called per batch."""

    module: nn.Module
    step: Callable[[Any, int], Any]
    """`(batch on the device, batch_idx) -> output`: `predict_step`, or else the module itself. It can be traced."""
    context: Callable[[], AbstractContextManager[Any]] | None
    """What the step runs inside of, for its precision. Never traced."""
    convert: Callable[[Any], Any] | None
    """`on_before_batch_transfer`, on the host; None where there is nothing to do."""
    to_device: Callable[[Any], Any]
    """`transfer_batch_to_device` and `on_after_batch_transfer`; for other modules, Lightning's copy."""


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]] | None:
    """The context of a precision, named as for a Trainer; None if it needs none.

    True half and double precision are not among them: Lightning sets torch's default dtype for these during each step,
    and that of all threads.

    Raises:
        ValueError: If there is no such precision, or the device does not have it.
    """
    if precision == "32-true":
        return None
    if precision not in _DTYPES:
        raise ValueError(
            f"`precision` must be '32-true', 'bf16-mixed' or '16-mixed', got {precision!r}. For weights of another"
            " dtype convert the model yourself: `model.to(torch.bfloat16)`."
        )
    if precision == "16-mixed" and device.type == "cpu":
        raise ValueError("`precision='16-mixed'` is not supported on the CPU. Pass 'bf16-mixed'.")
    return partial(torch.autocast, device.type, _DTYPES[precision])


def model_step(model: Model, device: torch.device, precision: str) -> ModelStep:
    """Move a model to its device and look up what is called per batch. In the thread that calls the device.

    Of a LightningModule, `configure_model` is called. Hooks that take a Trainer, or belong to its run, are not.

    Args:
        model: A module, or a function without arguments that makes one. It is set to eval mode, but for parts of it
            that `torch.export` has made.
        device: Where it runs.
        precision: See `autocast`.

    Raises:
        TypeError: If there is no module, or one whose steps fetch their batches themselves.
        ValueError: If the precision is not one of those above.
    """
    context = autocast(precision, device)
    module = model if isinstance(model, nn.Module) else model()
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"`model` must be an `nn.Module`, or a function without arguments that returns one, and it returned"
            f" {type(module).__name__}."
        )
    if not isinstance(module, LightningModule):
        _set_to_eval(module)
        module.to(device)
        return ModelStep(module, _without_index(module), context, None, partial(_moved, device))
    if uses_dataloader_iter(module):
        raise TypeError("A `predict_step` that takes `dataloader_iter` fetches its batches itself. It needs a Trainer.")
    if not has_stock_transfer(module):
        raise TypeError(
            f"{type(module).__name__} overrides `_apply_batch_transfer_handler`, which needs a Trainer. Override"
            " `transfer_batch_to_device` instead."
        )
    module.configure_model()
    _set_to_eval(module)
    module.to(device)
    return ModelStep(module, _predict_step(module), context, _convert(module), partial(_transferred, module, device))


def _set_to_eval(module: nn.Module) -> None:
    """Set a module to eval mode; what `torch.export` has made stays as it was exported, and refuses to be set."""
    try:
        module.eval()
    except NotImplementedError:
        for part in module.children():
            _set_to_eval(part)


def _without_index(module: nn.Module) -> Callable[[Any, int], Any]:
    def step(batch: Any, batch_idx: int) -> Any:
        return module(batch)

    return step


def _predict_step(module: LightningModule) -> Callable[[Any, int], Any]:
    if is_param_in_hook_signature(module.predict_step, "batch_idx", min_args=2):
        return lambda batch, batch_idx: module.predict_step(batch, batch_idx)
    return lambda batch, batch_idx: module.predict_step(batch)


def _convert(module: LightningModule) -> Callable[[Any], Any] | None:
    hook = getattr(module.on_before_batch_transfer, "__func__", None)
    if hook is LightningModule.on_before_batch_transfer:
        return None
    return lambda batch: module.on_before_batch_transfer(batch, 0)


def _moved(device: torch.device, batch: Any) -> Any:
    return move_data_to_device(batch, device)


def _transferred(module: LightningModule, device: torch.device, batch: Any) -> Any:
    return module.on_after_batch_transfer(module.transfer_batch_to_device(batch, device, 0), 0)
