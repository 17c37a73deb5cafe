"""The networks that a step calls: found or named, given graphs, kept from one run to the next."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.graphs import GraphCounts, GraphedForward
from lightning_hpu_infer.state import KeptState, KeptWeights
from lightning_hpu_infer.trace import LaneTrace
from lightning_hpu_infer.watch import outermost_calls


class NetworkGraphs:
    """The graphs of all networks that a step calls.

    Unless they are named, the networks are found by watching the first step: the outermost modules that it calls, if
    they have weights. The step itself is never captured, since its batch index would make every batch a graph of its
    own.

    Args:
        root: The module whose step is run; it names the networks.
        device: Where the networks are in a run.
        config: Its options for graphs are used.
        kind: "hpu_graph", or the backend that `torch.compile` is asked for.

    Raises:
        ValueError: If `graph_modules` names a module that there is not, or one inside of another.
    """

    def __init__(self, root: nn.Module, device: torch.device, config: InferenceConfig, kind: str) -> None:
        self._root = root
        self._device = device
        self._config = config
        self._kind = kind
        self._networks: dict[nn.Module, GraphedForward] | None = None
        self._weights: dict[nn.Module, KeptWeights] = {}
        self._states: dict[nn.Module, KeptState] = {}
        self._shadowed: list[tuple[nn.Module, object]] = []
        self._trace: LaneTrace | None = None
        self.counts = GraphCounts()
        if config.graph_modules is not None:
            self._found(_named(root, config.graph_modules))

    def serve(self, root: nn.Module, device: torch.device, config: InferenceConfig, kind: str) -> bool:
        """Whether these graphs are of use in such a run."""
        networks, modules = (self._networks or {}).items(), set(root.modules())
        return (
            self._root is root
            and self._config is config
            and (self._device, self._kind) == (device, kind)
            and all(module in modules and module.forward == graphed.forward for module, graphed in networks)
        )

    @contextmanager
    def attached(self, trace: LaneTrace | None = None) -> Iterator[None]:
        """Surround a run with this: the networks' calls are graphs meanwhile.

        What was captured in an earlier run is used again if the weights have the same values as then. It is compared
        with the plain forward once more, since a network reads Python values too.

        Args:
            trace: Where captures and replays are recorded.
        """
        self._trace = trace
        self.counts = GraphCounts()
        for module, graphed in (self._networks or {}).items():
            graphed.counts = self.counts
            # A compiled network reads its weights at every call, wherever they are.
            if module in self._states and (self._kind != "hpu_graph" or self._weights[module].put_back(self._root)):
                self._states[module].note_tensors(module)
                graphed.distrust(self._states[module])
            else:
                graphed.forget_all()
        self._weights.clear()
        self._states.clear()
        try:
            for module, graphed in (self._networks or {}).items():
                self._shadow(module, graphed)
            yield
            kept = [module for module, graphed in (self._networks or {}).items() if graphed.holds_graphs]
            self._states = {module: KeptState(module) for module in kept}
            self._weights = {module: KeptWeights(module) for module in kept if self._kind == "hpu_graph"}
        finally:
            for module, own in reversed(self._shadowed):
                if own is None:
                    del module.forward
                else:
                    module.__dict__["forward"] = own
            self._shadowed.clear()
            for graphed in (self._networks or {}).values():
                graphed.follow(None)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surround each step with this. The first is watched and runs plainly; its networks are graphs afterwards."""
        if self._networks is not None:
            yield
            return
        with outermost_calls() as called:
            yield
        networks = _outermost(called)
        if not networks:
            rank_zero_warn(
                f"`hpu_graphs={self._config.hpu_graphs!r}` has no effect: `predict_step` calls no module with weights."
                " Call your network as a module (`self.model(x)`), not through its methods or functions."
            )
        names = {module: name for name, module in self._root.named_modules()}
        for module, graphed in self._found({names.get(m) or type(m).__name__: m for m in networks}).items():
            self._shadow(module, graphed)

    def _found(self, networks: dict[str, nn.Module]) -> dict[nn.Module, GraphedForward]:
        self._networks = {
            module: GraphedForward(module, name, self._config, self._device, self._kind, self.counts)
            for name, module in networks.items()
        }
        return self._networks

    def _shadow(self, module: nn.Module, graphed: GraphedForward) -> None:
        if hasattr(module.forward, "hpu_infer_graphed"):
            raise RuntimeError(f"`{graphed.name}` is in use by another pipeline already. Close that one first.")

        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return graphed(*args, **kwargs)

        vars(forward)["hpu_infer_graphed"] = True
        graphed.follow(self._trace)
        self._shadowed.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward


def _outermost(called: Iterable[nn.Module]) -> list[nn.Module]:
    distinct = list(dict.fromkeys(called))
    inner = {child for module in distinct for child in module.modules() if child is not module}
    return [
        module
        for module in distinct
        # A metric keeps its state in Python, which a replay would not update.
        if module not in inner and not isinstance(module, Metric) and any(True for _ in module.parameters())
    ]


def _named(root: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
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
    return chosen
