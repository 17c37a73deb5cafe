"""What predictions depend on, in short: an earlier run's predictions are gone on with only if it is the same."""

import ast
import hashlib
import inspect
from collections.abc import Callable, Sequence
from textwrap import dedent
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_hpu_infer.samples import has_indices


def fingerprint_of(trainer: Trainer, module: LightningModule, loaders: Sequence[Any]) -> dict[str, Any]:
    """What the predictions of a run depend on, by name, as values of JSON.

    It has the weights and buffers of the state dictionary by their bytes, the code of `predict_step` and of
    `postprocess`, and the lengths of the datasets. For dataloaders whose samples have no indices, it has what their
    order depends on: devices, batch size and workers. It does not see other attributes of the module, the functions
    that the step calls, or what the samples are.

    Args:
        trainer: Whose run begins.
        module: Its module.
        loaders: Its dataloaders.
    """
    config: Any = getattr(trainer.accelerator, "config", None)
    postprocess = getattr(config, "postprocess", None)
    found: dict[str, Any] = {
        "weights": _digest_of_weights(module),
        "predict_step": _code_of(module.predict_step),
        "postprocess": None if postprocess is None else _code_of(postprocess),
        "dataset lengths": [_length(loader) for loader in loaders],
    }
    streams = {
        str(number): [trainer.world_size, getattr(loader, "batch_size", None), getattr(loader, "num_workers", 0)]
        for number, loader in enumerate(loaders)
        if not has_indices(loader)
    }
    if streams:
        found["devices, batch size and workers of streams, by dataloader"] = streams
    return found


def _length(loader: Any) -> int | None:
    if not has_indices(loader):
        return None
    return len(loader.dataset)


def _digest_of_weights(module: LightningModule) -> str:
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name}\n".encode())
        if not isinstance(value, Tensor):
            found.update(repr(value).encode())
            continue
        found.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
        if value.layout == torch.strided and value.numel():
            host = value.detach().cpu().contiguous()
            found.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _code_of(function: Callable[..., Any]) -> str:
    """The name of a function and a digest of its code, without comments and layout.

    Without its module's name, which is `__main__` in a script that another one may import.
    """
    inner: Any = inspect.unwrap(getattr(function, "__func__", function))
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    try:
        # Of an object that is called, its class.
        source = inspect.getsource(inner if inspect.isroutine(inner) else type(inner))
        text = ast.dump(ast.parse(dedent(source)))
    except (OSError, TypeError, SyntaxError):  # no source, or not a statement of its own, as a lambda's
        code = getattr(inner, "__code__", None)
        text = "" if code is None else repr((code.co_code, code.co_names, code.co_varnames))
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
