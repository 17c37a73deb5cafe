"""Whether batches may be prepared while the steps of earlier ones run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer.nested import tensors_in

# Attributes may be lists of all samples.
_LOOKED_AT = 16
# By their names, since they may never have been imported.
_OF_ONE_THREAD = {
    ("sqlite3", "Connection"),
    ("sqlite3", "Cursor"),
    ("_thread", "_local"),
    ("asyncio.events", "AbstractEventLoop"),
}


def reason_against(loaders: Iterable[Any], listeners: Sequence[object]) -> str:
    """Why no batch may be prepared before the step of the one before it has run; empty if nothing is known against it.

    Main thread only. Worker processes have copies of a dataset, and read ahead in stock Lightning too.

    Args:
        loaders: The dataloaders of a run.
        listeners: The module and the callbacks.
    """
    if has_modes():
        return "`torch.autocast` or `torch.set_default_device` is on, which only this thread has"
    for listener in listeners:
        if isinstance(listener, LightningModule) and _converts(listener):
            return f"`on_before_batch_transfer` of {type(listener).__name__} may use what earlier steps have written"
        if isinstance(listener, nn.Module) and any(map(_is_compiled, listener.modules())):
            return (
                f"a part of {type(listener).__name__} is compiled by `torch.compile`, which sets the random state back"
                " that the dataset may draw from"
            )
    datasets: list[object] = []
    for loader in loaders:
        if not isinstance(loader, DataLoader):
            datasets += _with_parts(loader)
        elif loader.num_workers == 0:
            datasets += _with_parts(loader.dataset)
    for dataset in datasets:
        if is_on_a_device([value for value in (dataset, *_held(dataset)) if isinstance(value, Tensor)]):
            return f"tensors of {type(dataset).__name__} are on the device, which only the main thread calls"
        if (found := next(filter(_is_of_one_thread, _held(dataset)), None)) is not None:
            return f"{type(dataset).__name__} holds what belongs to the main thread ({type(found).__name__})"
    ids = {id(dataset) for dataset in datasets}
    for listener in listeners:
        for holder in listener.modules() if isinstance(listener, nn.Module) else [listener]:
            if any(id(value) in ids for value in _held(holder)):
                return f"{type(holder).__name__} holds the dataset, which may depend on what was predicted before"
    return ""


def has_modes() -> bool:
    """Whether this thread computes on the host as no other one does: in autocast, or with another default device."""
    return torch.is_autocast_enabled("cpu") or torch.get_default_device().type != "cpu"


def is_on_a_device(batch: Any) -> bool:
    """Whether tensors of a batch are on a device already."""
    return any(tensor.device.type not in ("cpu", "meta") for tensor in tensors_in(batch))


def _with_parts(dataset: object) -> list[object]:
    """A dataset, and those that it is made of, as a `Subset` is."""
    found, rest = {}, [dataset]
    while rest:
        part = rest.pop()
        if id(part) not in found:
            found[id(part)] = part
            rest += [value for value in _held(part) if isinstance(value, Dataset)]
    return list(found.values())


def _converts(module: LightningModule) -> bool:
    hook = getattr(module.on_before_batch_transfer, "__func__", None)
    return hook is not LightningModule.on_before_batch_transfer


def _is_compiled(module: nn.Module) -> bool:
    return any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__)


def _is_of_one_thread(value: object) -> bool:
    return any((kind.__module__, kind.__name__) in _OF_ONE_THREAD for kind in type(value).__mro__)


def _held(holder: object) -> Iterator[object]:
    """An object's attributes, and what is in those that are collections."""
    for value in list(getattr(holder, "__dict__", {}).values()):
        yield value
        if isinstance(value, list | tuple):
            yield from value[:_LOOKED_AT]
        elif isinstance(value, Mapping):
            yield from islice(value.values(), _LOOKED_AT)
