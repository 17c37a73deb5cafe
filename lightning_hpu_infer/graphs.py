"""HPU graphs around the networks that a step calls: found, captured once per input signature, replayed."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torchmetrics import Metric

from lightning_hpu_infer import _habana

# Python values that mean the same in every call with an equal key.
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class NotCapturable(Exception):
    """Raised when a call cannot be a graph: its message says why, for the warning."""


@dataclass(frozen=True)
class GraphKey:
    """Everything that must be equal for a captured graph to stand for a call.

    The bridge's own key leaves out dtype and stride and takes `1` for `True` and `-1` for `-2`
    (bridge `hpu/graphs.py`, `input_hash`), so each of our keys gets a bridge wrapper of its own.
    """

    leaves: tuple[object, ...]
    """Per leaf of the arguments: shape, dtype and stride of a tensor; type and value of anything else."""

    modes: tuple[object, ...]
    """What else decides which ops are recorded: training, inference mode, autocast and its dtype."""

    structure: TreeSpec = field(hash=False)
    """How the leaves were nested. Compared, but not hashed: torch's specs are not hashable."""

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple["GraphKey", list[Any]]:
        """The key of a call and its flat arguments.

        Raises:
            NotCapturable: If a leaf is neither a device tensor nor a plain constant.
        """
        leaves, structure = tree_flatten((args, kwargs))
        device_type = _habana.DEVICE_TYPE
        modes = (
            module.training,
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        )
        return cls(tuple(map(_describe, leaves)), modes, structure), leaves


def _describe(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        if leaf.device.type != _habana.DEVICE_TYPE:
            # Its copy to the device would not be part of the graph: every replay would see the first value.
            raise NotCapturable(f"it is given a tensor on {leaf.device}; give it tensors on the device")
        return leaf.shape, leaf.dtype, leaf.stride()
    if isinstance(leaf, _CONSTANTS):
        return type(leaf), leaf
    raise NotCapturable(
        f"it is given a {type(leaf).__name__}, which may change unseen; give it tensors or plain values"
    )


class _FlatForward:
    """A network as the bridge sees it: tensors in, list of tensors out, so that the bridge's own key has no say."""

    def __init__(self, forward: Callable[..., Any], key: GraphKey, leaves: list[Any]) -> None:
        self._forward = forward
        self._structure = key.structure
        # Tensors are arguments of every call; holding those of the first would only cost device memory.
        self._constants, self._places = _without_tensors(leaves)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = tree_unflatten(_with_tensors(self._constants, self._places, tensors), self._structure)
        outputs, self.output_structure = tree_flatten(self._forward(*args, **kwargs))
        for leaf in outputs:
            if isinstance(leaf, Tensor) and leaf.device.type != _habana.DEVICE_TYPE:
                raise NotCapturable(f"it returns a tensor on {leaf.device}, which a graph would repeat for every batch")
            if not (leaf is None or isinstance(leaf, str | Tensor)):
                raise NotCapturable(f"it returns a {type(leaf).__name__}, which a graph would repeat for every batch")
        self.output_constants, self.output_places = _without_tensors(outputs)
        return [leaf for leaf in outputs if isinstance(leaf, Tensor)]


def _without_tensors(leaves: list[Any]) -> tuple[list[Any], list[int]]:
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return [None if isinstance(leaf, Tensor) else leaf for leaf in leaves], places


def _with_tensors(constants: list[Any], places: list[int], tensors: Iterable[Tensor]) -> list[Any]:
    leaves = list(constants)
    for place, tensor in zip(places, tensors, strict=True):
        leaves[place] = tensor
    return leaves


class _Graph:
    """One captured call. The first `__call__` captures and runs it, later ones replay it."""

    def __init__(self, forward: Callable[..., Any], key: GraphKey, leaves: list[Any]) -> None:
        # Not a method of this object: a reference cycle would leave the graph to the garbage collector.
        self._flat = _FlatForward(forward, key, leaves)
        self._places = self._flat._places
        self._run = _habana.graphed(self._flat)

    def __call__(self, leaves: list[Any]) -> Any:
        flat = self._flat
        outputs = self._run(*(leaves[place] for place in self._places))
        # The next replay overwrites the graph's tensors, and whoever called the network may keep what it got.
        owned = (tensor.clone() for tensor in outputs)
        return tree_unflatten(_with_tensors(flat.output_constants, flat.output_places, owned), flat.output_structure)


class GraphedForward:
    """Stands in for a module's `forward`: one graph per `GraphKey`, the plain forward where a graph will not do."""

    _capturing = False  # A graph inside a graph is refused by the bridge: the inner network is part of the outer.

    def __init__(self, module: nn.Module, name: str, max_graphs: int) -> None:
        self._module = module
        self._name = name
        self._forward = module.forward
        self._max_graphs = max_graphs
        self._graphs: dict[GraphKey, _Graph] = {}
        self._enabled = True
        self._warned: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; the result is the caller's own."""
        if not self._enabled or GraphedForward._capturing:
            return self._forward(*args, **kwargs)
        try:
            key, leaves = GraphKey.of(self._module, args, kwargs)
        except NotCapturable as reason:
            self._warn(str(reason))
            return self._forward(*args, **kwargs)
        graph = self._graphs.get(key)
        if graph is not None:
            return graph(leaves)
        if len(self._graphs) >= self._max_graphs:
            self._warn(f"it has {self._max_graphs} graphs already and saw a new input signature; raise `max_graphs`")
            return self._forward(*args, **kwargs)
        return self._first_call(key, leaves, args, kwargs)

    def _first_call(self, key: GraphKey, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        graph = _Graph(self._forward, key, leaves)
        GraphedForward._capturing = True
        try:
            with _habana.capture_undisturbed():
                output = graph(leaves)
        except BaseException as error:
            _habana.reset_capture(error)
            if not isinstance(error, Exception):
                raise
            failure = f"{type(error).__name__}: {error}"
        else:
            self._graphs[key] = graph
            return output
        finally:
            GraphedForward._capturing = False
        self._enabled = False
        self._warn(f"capturing it failed ({failure})")
        # An error of the network itself is raised again by this call, and so reaches the user as it is.
        return self._forward(*args, **kwargs)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            rank_zero_warn(f"The network `{self._name}` runs without an HPU graph: {reason}.")


class NetworkGraphs:
    """The graphs of all networks that a step calls.

    The networks are found by watching the first step: the outermost modules that it calls, if they have weights.
    The step itself is never captured, since its batch index would make every batch a graph of its own.

    Args:
        root: The module whose step is run; it names the networks in messages.
        max_graphs: Graphs per network.
    """

    def __init__(self, root: nn.Module, max_graphs: int) -> None:
        self._root = root
        self._max_graphs = max_graphs
        self._networks: list[nn.Module] | None = None
        self._shadowed: list[tuple[nn.Module, object]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surround each step with this. The first is watched and runs plainly; its networks are graphs afterwards."""
        if self._networks is not None:
            yield
            return
        with _outermost_calls() as called:
            yield
        self._networks = _networks(called)
        if not self._networks:
            rank_zero_warn(
                "`hpu_graphs=True` has no effect: `predict_step` calls no module with weights. Call your network as a"
                " module (`self.model(x)`), not through its methods or functions."
            )
        names = {module: name for name, module in self._root.named_modules()}
        for module in self._networks:
            self._wrap(module, names.get(module) or type(module).__name__)

    def restore(self) -> None:
        """Give every network its own `forward` back and release the graphs."""
        for module, own in reversed(self._shadowed):
            if own is None:
                del module.forward
            else:
                module.__dict__["forward"] = own
        self._shadowed.clear()
        self._networks = None

    def _wrap(self, module: nn.Module, name: str) -> None:
        graphed = GraphedForward(module, name, self._max_graphs)

        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return graphed(*args, **kwargs)

        self._shadowed.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward


def _networks(called: list[nn.Module]) -> list[nn.Module]:
    distinct = list(dict.fromkeys(called))
    inner = {child for module in distinct for child in module.modules() if child is not module}
    return [
        module
        for module in distinct
        # A metric keeps its state in Python, which a replay would not update.
        if module not in inner and not isinstance(module, Metric) and any(True for _ in module.parameters())
    ]


@contextmanager
def _outermost_calls() -> Iterator[list[nn.Module]]:
    """Collects the modules that this thread calls, without those that they call in turn."""
    called: list[nn.Module] = []
    thread = threading.get_ident()
    depth = 0

    def enter(module: nn.Module, _: object) -> None:
        nonlocal depth
        if threading.get_ident() == thread:
            if depth == 0:
                called.append(module)
            depth += 1

    def leave(*_: object) -> None:
        nonlocal depth
        if threading.get_ident() == thread:
            depth -= 1

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
