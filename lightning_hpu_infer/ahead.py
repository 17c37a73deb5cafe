"""Whether batches may be prepared while the steps of earlier ones run."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from lightning_hpu_infer.bytecode import names_in
from lightning_hpu_infer.held import CONSTANT, Held, Reach, is_users, used_by
from lightning_hpu_infer.nested import tensors_in
from lightning_hpu_infer.shared import Changes, assigned_variable, shared_state

_BEFORE = "on_before_batch_transfer"
_AFTER = ("transfer_batch_to_device", "on_after_batch_transfer")
# What a dataloader has in its workers, and what is looked at by name.
_OF_LOADERS = ("dataset", "collate_fn", "worker_init_fn", "sampler", "batch_sampler", "_iterator")
_OF_TRAINERS = {"predict_dataloaders", "datamodule"}  # from which the dataset can be had
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
        listeners: The module, the callbacks, and the datamodule or None.
    """
    listeners = [listener for listener in listeners if listener is not None]
    if has_modes():
        return "`torch.autocast` or `torch.set_default_device` is on, which only this thread has"
    for listener in listeners:
        if isinstance(listener, LightningModule | LightningDataModule) and _overrides(listener, _BEFORE):
            return f"`on_before_batch_transfer` of {_name(listener)} may use, or write, what steps and later hooks do"
        if isinstance(listener, nn.Module) and any(map(_is_compiled, listener.modules())):
            return (
                f"a part of {_name(listener)} is compiled by `torch.compile`, which sets the random state back"
                " that the dataset may draw from"
            )
    loaders = list(loaders)
    ahead = Reach(chain.from_iterable(map(parts_of, loaders)))
    return _reason_against_a_thread(ahead) or _dependence(ahead, listeners, begins=len(loaders))


def parts_of(loader: Any) -> list[Any]:
    """What makes a dataloader's batches in this process: its own objects, and functions."""
    if not isinstance(loader, DataLoader):
        return [loader]
    found = [loader.dataset, *_callable_parts(loader.collate_fn)] if loader.num_workers == 0 else []
    own = [value for name, value in vars(loader).items() if name not in _OF_LOADERS]
    return [*found, loader.batch_sampler, loader.sampler, *own]


def _callable_parts(function: Any) -> list[Any]:
    """A function with the object whose method it is; none of a library, such as a tokenizer's."""
    called = function
    while isinstance(called, partial):
        called = called.func
    called = getattr(called, "__self__", called)
    return [function, called] if isinstance(called, CONSTANT) or is_users(type(called)) else []


def _reason_against_a_thread(ahead: Reach) -> str:
    for value, holder, *_ in ahead:
        if isinstance(value, Tensor) and is_on_a_device(value):
            return f"tensors of {_name(holder)} are on the device, which only the main thread calls"
        if _is_of_one_thread(value):
            return f"{_name(holder)} holds what belongs to the main thread ({_name(value)})"
    return ""


def _dependence(ahead: Reach, listeners: Sequence[object], begins: int) -> str:
    """How what runs ahead and what runs with the steps may depend on each other; empty if that is not seen.

    Args:
        ahead: What makes the batches.
        listeners: As in `reason_against`.
        begins: How many dataloaders begin, each of which draws a seed.
    """
    modules = [module for listener in listeners if isinstance(listener, nn.Module) for module in listener.modules()]
    acting = [*filter(_acts_with_steps, listeners), *modules]
    for root in acting:
        if (held := ahead.found.get(id(root))) is not None:
            return f"{_name(held.holder)} holds {_name(root)}, so that a batch may depend on the steps before it"
    for value, holder, *_ in ahead:
        if isinstance(value, Trainer) and not isinstance(holder, LightningDataModule):
            return f"{_name(holder)} holds the Trainer, so that a batch may depend on the steps before it"
    # A datamodule holds the dataset; what matters is whether those hooks use it.
    used = chain.from_iterable(used_by(data, _AFTER) for data in acting if isinstance(data, LightningDataModule))
    behind = Reach([root for root in acting if not isinstance(root, LightningDataModule)], used, beside=ahead)
    for key, held in ahead.found.items():
        if _makes_batches(held) and (found := behind.found.get(key)) is not None:
            return f"{_name(found.holder)} holds {_name(held.value)}, so that a batch may depend on the steps before it"
    if (shared := shared_state(ahead, behind)) is not None:
        one, other = shared
        return (
            f"{_name(one.holder)} (`{one.name}`) and {_name(other.holder)} (`{other.name}`) hold the same"
            f" {_name(one.value)}, so that a batch may depend on the steps before it"
        )
    if name := assigned_variable(ahead, behind):
        return f"functions of yours assign to the variable `{name}`, so that a batch may depend on the steps before it"
    if (step := behind.drawing()) and (data := ahead.drawing() or ("DataLoader.__iter__" if begins > 1 else "")):
        return f"`{step}` and `{data}` draw random numbers, which would come in another order"
    return _dependence_through_the_trainer(ahead, behind)


def _dependence_through_the_trainer(ahead: Reach, behind: Reach) -> str:
    """How functions may change, or read changes of, what they find in the Trainer; empty if that is not seen."""
    functions = behind.functions()
    finding = {each for each in functions if not _OF_TRAINERS.isdisjoint(names_in(each.__code__))}
    if not finding:
        return ""
    changes = Changes(finding | ahead.functions())
    for held in ahead:
        if not isinstance(held.value, CONSTANT) and changes.reach(held.value, {held.name or "dataset"}):
            function = min(each.__qualname__ for each in finding)
            return f"`{function}` finds {_name(held.value)} in the Trainer, so that a batch may depend on the steps"
    return ""


def _acts_with_steps(listener: object) -> bool:
    """Whether what it does, it may do for one batch while a later one is prepared."""
    if isinstance(listener, LightningDataModule):
        return any(_overrides(listener, name) for name in _AFTER)
    return not type(listener).__module__.startswith("lightning_hpu_infer.")


def _makes_batches(held: Held) -> bool:
    """Whether it is an object of the dataloader, and not what such an object uses."""
    return isinstance(held.value, Dataset | Sampler | BatchSampler) or (
        held.depth == 0 and not isinstance(held.value, CONSTANT)
    )


def _name(value: object) -> str:
    name = getattr(value, "__qualname__", None)
    return f"`{name}`" if isinstance(value, FunctionType | MethodType) else type(value).__name__


def has_modes() -> bool:
    """Whether this thread computes on the host as no other one does: in autocast, or with another default device."""
    return torch.is_autocast_enabled("cpu") or torch.get_default_device().type != "cpu"


def is_on_a_device(batch: Any) -> bool:
    """Whether tensors of a batch are on a device already."""
    return any(tensor.device.type not in ("cpu", "meta") for tensor in tensors_in(batch))


def _overrides(owner: LightningModule | LightningDataModule, name: str) -> bool:
    return getattr(getattr(owner, name), "__func__", None) is not getattr(LightningModule, name)


def _is_compiled(module: nn.Module) -> bool:
    return any(kind.__name__ == "OptimizedModule" for kind in type(module).__mro__)


def _is_of_one_thread(value: object) -> bool:
    return any((kind.__module__, kind.__name__) in _OF_ONE_THREAD for kind in type(value).__mro__)
