"""The front end: the step of a model, or modules of it, run through graphs during a run."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from math import inf
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_hpu_infer import _habana, _torch
from lightning_hpu_infer._lightning import is_profilers_hook
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.graphs.context import GraphContext
from lightning_hpu_infer.graphs.counts import GraphCounts
from lightning_hpu_infer.graphs.direct import DirectGraphs
from lightning_hpu_infer.graphs.networks import CallSites, OutermostCalls, named_modules, repeated_blocks
from lightning_hpu_infer.graphs.traced import NOTHING, TRACING_FAILED, TracedCall
from lightning_hpu_infer.graphs.weights import KeptWeights
from lightning_hpu_infer.observer import Observer

Step = Callable[..., Any]
Kind = Literal["hpu_graph", "direct", "hpu_backend", "inductor"]

# What tracing costs, and after how many batches it has paid for itself: `python -m benchmarks.graphs`, docs/graphs.md.
_SECONDS_PER_MODULE = 0.02
_NEGLIGIBLE_SECONDS = 1.0
_BREAK_EVEN = 400
_BREAK_EVEN_BLOCKS = 120
# A network that a step calls more often than this is in a loop, which tracing the step would unroll.
_MAX_CALLS = 4
_STEP = "`predict_step`"


def graph_kind(device: torch.device, config: InferenceConfig) -> Kind | None:
    """What `hpu_graphs` means on a device: HPU graphs, a backend of `torch.compile`, or nothing.

    Raises:
        MisconfigurationException: If the device's mode cannot do what was asked for.
    """
    asked = config.hpu_graphs
    if asked is False:
        return None
    if device.type != _habana.DEVICE_TYPE:
        return "inductor" if asked == "compile" else None
    # In eager mode the bridge captures nothing, and would return the first batch's outputs for every batch.
    lazy = _habana.is_lazy()
    if asked == "compile" if lazy else asked in ("hpu_graph", "direct"):
        mode, other = ("lazy", "0") if lazy else ("eager", "1")
        raise MisconfigurationException(
            f"`hpu_graphs={asked!r}` is not possible in {mode} mode. Set PT_HPU_LAZY_MODE={other} before Python starts,"
            " or pass `hpu_graphs=True`, which does what the mode can."
        )
    if asked == "direct":
        return "direct"
    return "hpu_graph" if lazy else "hpu_backend"


class StepGraphs:
    """The graphs of a model, kept from one run to the next. Main thread only.

    Args:
        root: The model whose step runs.
        device: The device that it is on during a run.
        config: Its options for graphs are used.
        kind: What `graph_kind` returned.

    Raises:
        ValueError: If `graph_modules` names a module that does not exist, or one inside of another.
    """

    def __init__(self, root: nn.Module, device: torch.device, config: InferenceConfig, kind: Kind) -> None:
        self._root = root
        self._device = device
        self._config = config
        self._kind = kind
        self._context = GraphContext(root, config, device, kind)
        self._kept: KeptWeights | None = None
        self._calls: dict[str, TracedCall] = {}
        """By name: the step, the networks, the kinds of blocks."""
        self._modules: dict[str, list[nn.Module]] | None = None
        """The modules that are traced by themselves; None while the whole step is traced."""
        names = config.graph_modules
        if names is not None:
            self._modules = repeated_blocks(root) if names == "blocks" else named_modules(root, names)
            if not self._modules:
                self._context.warn(
                    "blocks",
                    f"`graph_modules='blocks'` has no effect: {type(root).__name__} has no `nn.ModuleList` of modules"
                    " of one class. Name modules, or leave it out.",
                )
        self._planned = False
        self._chosen = False
        """Whether what is traced was chosen by the length of the run."""
        self._batches: float = inf
        self._batches_before = 0
        """Batches of earlier runs."""
        self._networks: dict[str, list[nn.Module]] = {}
        """Those that the step called in the first batch."""
        # Graphs hold device memory, and Dynamo may hold graphs: free it without waiting for the garbage collector.
        self._release = weakref.finalize(self, self._context.release)
        self._release.atexit = False
        if kind in ("hpu_graph", "hpu_backend"):
            _torch.ensure_device_interface(device.type)

    @property
    def counts(self) -> GraphCounts:
        """What the graphs did in the current run, or in the last one."""
        return self._context.counts

    def release(self) -> None:
        """Free the device memory of all graphs. Not during a run; this object must not be used afterwards."""
        self._release()

    def can_reuse(self, root: nn.Module, device: torch.device, config: InferenceConfig, kind: str) -> bool:
        """Whether these graphs can be used in a run with these arguments, as for the constructor."""
        modules = set(root.modules())
        return (
            self._root is root
            and self._config is config
            and (self._device, self._kind) == (device, kind)
            and all(module in modules for each in (self._modules or {}).values() for module in each)
        )

    def expect(self, batches: float) -> None:
        """Set how many batches the run has, before the first one; infinity if that is not known."""
        self._batches = batches

    @contextmanager
    def attached(self, step: Step, observer: Observer | None = None) -> Iterator[Step]:
        """Surround a run with this. The model must be on the device.

        Args:
            step: What is called per batch.
            observer: Observes captures and replays.

        Yields:
            The step, to be called in its place.
        """
        context = self._context
        self._batches_before = context.step
        self._batches = inf
        if self._chosen:
            # Many short runs together may be worth a trace.
            self._modules, self._planned, self._chosen = None, False, False
        context.begin(observer or Observer())
        if self._kept is not None:
            now = self._kept.restore(self._root)
            for graph in context.graphs():
                graph.rebind(now)
            self._kept = None
        with ExitStack() as stack:
            stack.enter_context(_habana.without_naming_hooks(self._root, is_profilers_hook))
            self._sites = CallSites()
            stack.callback(self._sites.close)
            stack.callback(self._wait_for_replays)
            if self._kind == "hpu_graph":
                stack.enter_context(context.replacements.watched())
            for call in self._calls.values():
                call.begin_run()
            if self._modules is not None:
                self._attach(self._modules)
            try:
                yield partial(self._run, step)
            except BaseException:
                # The last replay may be incomplete; and once the model has moved, graphs would read old weights.
                self._wait_for_replays()
                context.release()
                raise
            if self._kind == "hpu_graph" and context.holds_graphs():
                self._kept = KeptWeights(self._root)

    def _wait_for_replays(self) -> None:
        """Wait for the last replay, since graphs may be freed at any time after a run."""
        if self._context.holds_graphs():
            with suppress(Exception):  # an error of the device is raised where its results are read
                _habana.synchronize()

    # A batch

    def _run(self, step: Step, *args: Any, **kwargs: Any) -> Any:
        self._context.step += 1
        if not self._planned:
            self._planned = True
            output = self._first(step, args, kwargs)
        elif self._modules is not None:
            output = step(*args, **kwargs)
        else:
            call = self._call(_STEP)
            output = call(step, *args, **kwargs)
            if call.given_up:
                self._use_networks(call.given_up)
        self._context.emit_warnings()
        return output

    def _first(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the first batch plainly, note which networks the step calls, and choose what is traced."""
        if self._modules is not None:
            return step(*args, **kwargs)
        call, calls = self._call(_STEP), OutermostCalls(self._root)
        with calls.watched():
            output = call.first(step, *args, **kwargs)
        self._networks = calls.networks()
        looped = [name for name, (module,) in self._networks.items() if calls.counts[module] > _MAX_CALLS]
        if looped:
            rank_zero_info(
                f"Graphs: `predict_step` calls `{looped[0]}` in a loop, so the networks that it calls are traced by"
                " themselves and not the whole step."
            )
            self._modules = self._networks
            self._attach(self._modules)
        elif self._config.hpu_graphs is True:
            self._choose()
        return output

    def _choose(self) -> None:
        """Trace the step, its blocks or nothing: whichever pays in the batches that the run has."""
        leaves = sum(1 for module in self._root.modules() if next(module.children(), None) is None)
        seconds = leaves * _SECONDS_PER_MODULE
        batches = self._batches + self._batches_before
        if seconds <= _NEGLIGIBLE_SECONDS or batches >= _BREAK_EVEN:
            return
        self._chosen = True
        blocks = repeated_blocks(self._root)
        if blocks and batches >= _BREAK_EVEN_BLOCKS:
            self._modules = blocks
            self._attach(blocks)
            rank_zero_info(
                f"Graphs: in a run of {self._batches:g} batches tracing the whole step (about {seconds:.0f} s) does not"
                f" pay, so repeated blocks are traced instead ({', '.join(blocks)}). Pass `hpu_graphs='hpu_graph'` or"
                " 'compile' to trace the step."
            )
            return
        self._modules = {}
        rank_zero_info(
            f"Graphs: nothing is traced, since a run of {self._batches:g} batches cannot win back the time (about"
            f" {seconds:.0f} s). Pass `hpu_graphs='hpu_graph'` or 'compile' to trace all the same, or"
            " `graph_modules='blocks'` to trace repeated blocks only."
        )

    def _use_networks(self, reason: str) -> None:
        """Run the step plainly from now on, and trace the networks that it calls by themselves."""
        self._modules = self._networks
        if not self._networks and reason == NOTHING:
            return
        names = ", ".join(f"`{name}`" for name in self._networks)
        after = f"graphs are made of the networks that it calls: {names}" if names else "it calls no networks either"
        remedy = ""
        if reason.startswith(TRACING_FAILED) and self._kind == "hpu_graph":
            remedy = f" If that fails too: `hpu_graphs='direct'` with `graph_modules={list(self._networks)}`."
        self._context.warn(
            "step",
            f"`predict_step` as a whole runs without a graph from now on: {reason}. It runs plainly, and {after}."
            + remedy,
        )
        self._attach(self._modules)

    # Calls

    def _call(self, name: str, root: nn.Module | None = None) -> TracedCall:
        call = self._calls.get(name)
        if call is None:
            call = TracedCall(root or self._root, name, self._context, of_modules=root is not None)
            self._calls[name] = call
        return call

    def _attach(self, kinds: dict[str, list[nn.Module]]) -> None:
        if self._kind == "direct":
            direct = DirectGraphs(self._context)
            self._sites.attach([module for modules in kinds.values() for module in modules], direct)
            return
        for name, modules in kinds.items():
            self._sites.attach(modules, partial(self._run_module, self._call(f"`{name}`", modules[0])))

    def _run_module(self, call: TracedCall, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = call(module, *args, **kwargs)
        if call.given_up:
            self._context.warn(
                call.name,
                f"The network {call.name} runs without graphs from now on: {call.given_up}. Pass what changes as a"
                " tensor, or name other modules (`graph_modules`).",
            )
        return output
