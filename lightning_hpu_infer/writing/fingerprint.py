"""What predictions depend on, in short: an earlier run's predictions are gone on with only if it is the same."""

from collections.abc import Sequence
from operator import index
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_hpu_infer.samples import batching_of, has_indices
from lightning_hpu_infer.writing.digest import code_of, digest_of


def fingerprint_of(trainer: Trainer, module: LightningModule, loaders: Sequence[Any]) -> dict[str, Any]:
    """What the predictions of a run depend on, by name, as values of JSON.

    It has weights and buffers by their bytes, `predict_step` and `postprocess` by their code and the values that are
    bound in them, and the lengths of the datasets. For dataloaders whose samples have no indices, it has what their
    order depends on: devices, batch size and workers. It does not see other attributes of the module, global variables,
    the functions that the step calls, or what the samples are.

    Args:
        trainer: Whose run begins.
        module: Its module.
        loaders: Its dataloaders.
    """
    config: Any = getattr(trainer.accelerator, "config", None)
    postprocess = getattr(config, "postprocess", None)
    state = module.state_dict()
    outside = {
        name: value for name, value in (*module.named_parameters(), *module.named_buffers()) if name not in state
    }
    found: dict[str, Any] = {
        "weights": digest_of(dict(sorted(state.items()))),
        "predict_step": code_of(module.predict_step),
        "postprocess": None if postprocess is None else code_of(postprocess),
        "dataset lengths": [_length(loader) for loader in loaders],
    }
    if outside:
        found["weights and buffers outside of the state dictionary"] = digest_of(dict(sorted(outside.items())))
    streams = {
        str(number): [
            trainer.world_size,
            _number(getattr(batching_of(loader), "batch_size", None)),
            _number(getattr(loader, "num_workers", 0)),
        ]
        for number, loader in enumerate(loaders)
        if not has_indices(loader)
    }
    if streams:
        found["devices, batch size and workers of streams, by dataloader"] = streams
    return found


def _length(loader: Any) -> int | None:
    if not has_indices(loader):
        return None
    try:
        return len(loader.dataset)
    except Exception:  # A sampler of the user's does not need it.
        return None


def _number(value: Any) -> int | None:
    """An integer of any type; None for whatever else a user's own dataloader has under the name."""
    try:
        return index(value)
    except Exception:
        return None
