"""Which modules are traced by themselves: named ones, repeated blocks, or those that a step calls."""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torchmetrics import Metric

from lightning_hpu_infer import _torch


def named_modules(root: nn.Module, names: Iterable[str]) -> dict[str, list[nn.Module]]:
    """The modules that `graph_modules` names.

    Returns:
        Per name, a list of that module only.

    Raises:
        ValueError: If there is no such module, or one is inside of another.
    """
    modules = dict(root.named_modules())
    chosen: dict[str, nn.Module] = {}
    for name in names:
        if name not in modules:
            known = [each for each in modules if each and each.count(".") <= name.count(".")]
            raise ValueError(
                f"`graph_modules` names {name!r}, which {type(root).__name__} does not have. It has {', '.join(known)}."
            )
        for other, module in chosen.items():
            if modules[name] in set(module.modules()) or module in set(modules[name].modules()):
                raise ValueError(f"`graph_modules` names {other!r} and {name!r}, of which one is a part of the other.")
        chosen[name] = modules[name]
    return {name: [module] for name, module in chosen.items()}


def repeated_blocks(root: nn.Module) -> dict[str, list[nn.Module]]:
    """The outermost children of `nn.ModuleList` that share a class, such as the layers of an encoder.

    Returns:
        Per class of blocks in a list, a name for messages and these blocks, which share a trace.
    """
    found: dict[str, list[nn.Module]] = {}
    inside: set[nn.Module] = set()
    for name, module in root.named_modules():
        if not isinstance(module, nn.ModuleList) or module in inside:
            continue
        for kind, count in Counter(type(child) for child in module).items():
            if count > 1:
                blocks = [child for child in module if type(child) is kind]
                found[f"{name}.*" if count == len(module) else f"{name}.* ({kind.__name__})"] = blocks
                inside.update(part for block in blocks for part in block.modules())
    return found


class OutermostCalls:
    """Counts the outermost modules that this thread calls.

    Args:
        root: The model, which is not counted.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.counts: Counter[nn.Module] = Counter()
        """Calls per module."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count inside of this."""
        thread = threading.get_ident()
        depth = 0

        def watching(module: nn.Module) -> bool:
            # Hooks must leave nothing in code that the user's torch.compile traces meanwhile.
            return not torch.compiler.is_compiling() and threading.get_ident() == thread and module is not self._root

        def enter(module: nn.Module, _: object) -> None:
            nonlocal depth
            if watching(module):
                if depth == 0:
                    self.counts[module] += 1
                depth += 1

        def leave(module: nn.Module, *_: object) -> None:
            nonlocal depth
            if watching(module):
                depth -= 1

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        try:
            with warnings.catch_warnings():
                # Dynamo warns of these hooks where the user has compiled a module.
                warnings.filterwarnings("ignore", "Using `torch.compile")
                yield
        finally:
            for handle in handles:
                handle.remove()

    def networks(self) -> dict[str, list[nn.Module]]:
        """The counted modules that have weights and are not inside of another one, by their names in the model."""
        inner = {child for module in self.counts for child in module.modules() if child is not module}
        names = {module: name for name, module in self._root.named_modules()}
        return {
            names.get(module) or type(module).__name__: [module]
            for module in self.counts
            # A metric is called for its state.
            if module not in inner and not isinstance(module, Metric) and any(True for _ in module.parameters())
        }


class _Entry:
    """What a module's `__call__` calls during a run, instead of the module's implementation."""

    def __init__(self, call: Callable[..., Any], module: nn.Module) -> None:
        self._call = call
        self._module = module
        self._thread = threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            # Another thread's replay could overwrite results before they are copied.
            return _torch.call_module(self._module, *args, **kwargs)
        return self._call(self._module, *args, **kwargs)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copied or pickled module has None instead, which is the default of `nn.Module`.
        return type(None), ()


class CallSites:
    """Redirects calls of modules, by the attribute that `nn.Module.compile` uses, until it is closed."""

    def __init__(self) -> None:
        self._entries: list[tuple[nn.Module, _Entry]] = []

    def attach(self, modules: Sequence[nn.Module], call: Callable[..., Any]) -> None:
        """Redirect calls to `call(module, *args, **kwargs)`; calls of other threads run plainly.

        Modules that the user has compiled stay as they are.
        """
        for module in modules:
            if module._compiled_call_impl is None:
                entry = _Entry(call, module)
                vars(module)["_compiled_call_impl"] = entry
                self._entries.append((module, entry))

    def close(self) -> None:
        """Leave the modules as they were."""
        while self._entries:
            module, entry = self._entries.pop()
            if vars(module).get("_compiled_call_impl") is entry:
                del module._compiled_call_impl
