"""HPU graphs around the networks that a step calls: found, captured once per input signature, checked, replayed."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torchmetrics import Metric

from lightning_hpu_infer import _habana
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.watch import HostReads, outermost_calls

# Python values that mean the same in every call with an equal key.
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# How far a replay may be from the plain forward, relative to the largest value: rounding, not a wrong result.
_TOLERANCES = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-3}


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
    if isinstance(leaf, float | complex):
        return type(leaf), repr(leaf)  # 0.0 and -0.0 are equal, nan is not even equal to itself
    if isinstance(leaf, _CONSTANTS):
        return type(leaf), leaf
    raise NotCapturable(f"it is given a {type(leaf).__name__}, which may change unseen; give it tensors or constants")


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
        given = {_describe(tensor) for tensor in tensors}
        # A replay refreshes only what the graph computes: an input that is handed back would stay the first one.
        return [
            leaf.clone() if _habana.is_view(leaf) or _describe(leaf) in given else leaf
            for leaf in outputs
            if isinstance(leaf, Tensor)
        ]


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

    def __init__(self, forward: Callable[..., Any], key: GraphKey, leaves: list[Any], verify: int) -> None:
        # Not a method of this object: a reference cycle would leave the graph to the garbage collector.
        self._flat = _FlatForward(forward, key, leaves)
        self._places = self._flat._places
        self._run = _habana.graphed(self._flat)
        self.captured = False
        self.to_verify = verify + 1 if verify else 0
        """Calls still to be compared with the plain forward: the capturing one, and the first replays."""

    def __call__(self, leaves: list[Any]) -> Any:
        flat = self._flat
        outputs = self._run(*_independent(leaves[place] for place in self._places))
        # The next replay overwrites the graph's tensors, and whoever called the network may keep what it got.
        owned = (tensor.clone() for tensor in outputs)
        return tree_unflatten(_with_tensors(flat.output_constants, flat.output_places, owned), flat.output_structure)


def _independent(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors that cannot be each other's aliases and are no views.

    The bridge matches a graph's inputs by tensor: one that is given twice becomes one input, and a view becomes a
    static input that later calls overwrite, together with what it shows (bridge `hpu/graphs.py`, `replayV3`). Equal
    layouts are the only way for two tensors that are no views to be the same memory.
    """
    seen: set[object] = set()
    independent = []
    for tensor in tensors:
        layout = _describe(tensor)
        independent.append(tensor.clone() if layout in seen or _habana.is_view(tensor) else tensor)
        seen.add(layout)
    return independent


class GraphedForward:
    """Stands in for a module's `forward`: one graph per `GraphKey`, the plain forward where a graph will not do.

    The first call with a new key runs plainly and is watched; it also fills caches that the network grows lazily. The
    second captures. It and the first replays are compared with the plain forward on the same inputs.
    """

    _capturing = False  # A graph inside a graph is refused by the bridge: the inner network is part of the outer.

    def __init__(self, module: nn.Module, name: str, config: InferenceConfig) -> None:
        self._module = module
        self._name = name
        self._forward = module.forward
        self._config = config
        self._graphs: dict[GraphKey, _Graph | None] = {}
        """None where a graph would be wrong."""
        self._warned: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; the result is the caller's own."""
        if GraphedForward._capturing or torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        try:
            key, leaves = GraphKey.of(self._module, args, kwargs)
        except NotCapturable as reason:
            self._warn(str(reason))
            return self._forward(*args, **kwargs)
        if key not in self._graphs:
            return self._watched_call(key, leaves, args, kwargs)
        graph = self._graphs[key]
        if graph is None:
            return self._forward(*args, **kwargs)
        if graph.captured and not graph.to_verify:
            return graph(leaves)
        return self._checked_call(graph, key, leaves, args, kwargs)

    def _watched_call(self, key: GraphKey, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run plainly, and find out whether a graph would do the same."""
        if len(self._graphs) >= self._config.max_graphs:
            self._warn(
                f"it has {self._config.max_graphs} graphs already and saw a new input signature; raise `max_graphs`"
            )
            return self._forward(*args, **kwargs)
        with HostReads(leaves) as reads:
            output = self._forward(*args, **kwargs)
        reason = reads.found or _unfit(self._module)
        if reason:
            self._warn(reason)
        self._graphs[key] = None if reason else _Graph(self._forward, key, leaves, self._config.verify_graphs)
        return output

    def _checked_call(
        self, graph: _Graph, key: GraphKey, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Capture or replay, and compare with the plain forward while there is something to verify."""
        expected = self._forward(*args, **kwargs) if graph.to_verify else None
        output, reason = (graph(leaves), "") if graph.captured else self._capture(graph, leaves)
        if not reason and graph.to_verify:
            graph.to_verify -= 1
            if difference := _difference(output, expected):
                reason = (
                    f"a replay differs from the plain forward ({difference}). It may read a Python value that changes,"
                    " or draw random numbers; a graph would repeat those of the call that was captured"
                )
            output = expected
        if not reason:
            return output
        self._graphs[key] = None
        self._warn(reason)
        # An error of the network itself is raised again by this call, and so reaches the user as it is.
        return expected if expected is not None else self._forward(*args, **kwargs)

    def _capture(self, graph: _Graph, leaves: list[Any]) -> tuple[Any, str]:
        """The output of the capturing call, or why there is none."""
        GraphedForward._capturing = True
        try:
            with _habana.capture_undisturbed():
                output = graph(leaves)
        except BaseException as error:
            _habana.reset_capture(error)
            if not isinstance(error, Exception):
                raise
            return None, f"capturing it failed ({type(error).__name__}: {error})"
        finally:
            GraphedForward._capturing = False
        graph.captured = True
        return output, ""

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            rank_zero_warn(f"The network `{self._name}` runs without an HPU graph: {reason}.")


def _unfit(module: nn.Module) -> str:
    """Why a module must not be captured, by its looks."""
    for name, child in module.named_modules():
        hooks = [*child._forward_hooks.values(), *child._forward_pre_hooks.values()]
        # In lazy mode the bridge puts hooks of its own on every module (bridge `torch_overwrites.py`).
        own = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("habana_frameworks")]
        if name and own:
            return f"its part `{name}` has forward hooks, which a replay would not call; remove them"
    return ""


def _difference(output: Any, expected: Any) -> str:
    """How two results differ, or nothing. Waits for the device."""
    (leaves, structure), (others, other_structure) = tree_flatten(output), tree_flatten(expected)
    if structure != other_structure:
        return "its structure changes"
    for one, other in zip(leaves, others, strict=True):
        if not isinstance(one, Tensor):
            if one != other:
                return f"{one!r} instead of {other!r}"
            continue
        one, other = one.cpu(), other.cpu()
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{one.dtype}{list(one.shape)} instead of {other.dtype}{list(other.shape)}"
        tolerance = _TOLERANCES.get(one.dtype, 0.0)
        one, other = one.double(), other.double()
        finite = other[other.isfinite()].abs()
        scale = float(finite.max()) if finite.numel() else 0.0
        if not torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            return f"largest difference {float((one - other).abs().max()):.3g}, largest value {scale:.3g}"
    return ""


class NetworkGraphs:
    """The graphs of all networks that a step calls.

    The networks are found by watching the first step: the outermost modules that it calls, if they have weights.
    The step itself is never captured, since its batch index would make every batch a graph of its own.

    Args:
        root: The module whose step is run; it names the networks in messages.
        config: `max_graphs` and `verify_graphs` are used.
    """

    def __init__(self, root: nn.Module, config: InferenceConfig) -> None:
        self._root = root
        self._config = config
        self._networks: list[nn.Module] | None = None
        self._shadowed: list[tuple[nn.Module, object]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surround each step with this. The first is watched and runs plainly; its networks are graphs afterwards."""
        if self._networks is not None:
            yield
            return
        with outermost_calls() as called:
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
        if hasattr(module.forward, "hpu_infer_graphed"):
            raise RuntimeError(f"`{name}` is in use by another pipeline already. Close that one first.")
        graphed = GraphedForward(module, name, self._config)

        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return graphed(*args, **kwargs)

        vars(forward)["hpu_infer_graphed"] = True
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
