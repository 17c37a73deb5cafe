"""HPU graphs of one network: captured once per signature of its call, checked, replayed, forgotten when unused."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.compare import difference
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.shapes import pad_rows
from lightning_hpu_infer.signature import (
    GraphKey,
    Layout,
    NotCapturable,
    flatten,
    layout,
    with_tensors,
    without_tensors,
)
from lightning_hpu_infer.state import KeptState, replaced, tensors_kept_by
from lightning_hpu_infer.trace import LaneTrace, Stage
from lightning_hpu_infer.watch import HostReads

# Signatures of one network that are remembered, captured or not.
_MAX_KEYS = 1024
# Watched calls in which a network may still make its caches.
_PATIENCE = 3
# So many Python values of the same arguments are no longer a setting but data.
_MANY_VALUES = 4


@dataclass
class GraphCounts:
    """What the graphs of a run did."""

    captures: int = 0
    """Graphs captured, or networks compiled."""
    replays: int = 0
    padded: int = 0
    """Replays with rows added to fill a larger graph's batch."""
    plain_calls: int = 0
    """Calls of a network without a graph, the first call of each signature included."""
    verified: int = 0
    """Replays, captures among them, that were compared with the plain forward."""
    evictions: int = 0
    """Graphs dropped for newer ones."""

    def __str__(self) -> str:
        text = f"Graphs: {self.captures} captured, {self.replays} replays, {self.plain_calls} calls without a graph."
        if self.evictions:
            text += (
                f" {self.evictions} graphs were dropped for newer ones: raise `max_graphs`, or let fewer shapes occur."
            )
        return text


class _Graph:
    """One captured call. The first `__call__` captures and runs it, later ones replay it."""

    def __init__(self, forward: Callable[..., Any], key: GraphKey, leaves: list[Any]) -> None:
        # Not a method of this object: a reference cycle would leave the graph to the garbage collector.
        self._flat = _FlatForward(forward, key, leaves)
        self._run = _habana.graphed(self._flat)

    def __call__(self, leaves: list[Any]) -> Any:
        flat = self._flat
        outputs = self._run(*_independent(leaves[place] for place in flat.places))
        # The next replay overwrites the graph's tensors, and whoever called the network may keep what it got.
        owned = (tensor.clone() for tensor in outputs)
        return flat.output_structure.unflatten(with_tensors(flat.output_constants, flat.output_places, owned))

    @staticmethod
    @contextmanager
    def capturing() -> Iterator[None]:
        """Surround the first call with this; leaves a clean state if it fails."""
        try:
            with _habana.capture_undisturbed():
                yield
        except BaseException as error:
            _habana.reset_capture(error)
            raise


class _FlatForward:
    """A network as the bridge sees it: tensors in, list of tensors out, so that the bridge's own key has no say."""

    def __init__(self, forward: Callable[..., Any], key: GraphKey, leaves: list[Any]) -> None:
        self._forward = forward
        self._structure = key.structure
        # Tensors are arguments of every call; holding those of the first would only cost device memory.
        self._constants, self.places = without_tensors(leaves)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        args, kwargs = self._structure.unflatten(with_tensors(self._constants, self.places, tensors))
        outputs, self.output_structure = flatten(self._forward(*args, **kwargs))
        for leaf in outputs:
            if isinstance(leaf, Tensor) and leaf.device.type != _habana.DEVICE_TYPE:
                raise NotCapturable(f"it returns a tensor on {leaf.device}, which a graph would repeat for every batch")
            if not (leaf is None or isinstance(leaf, str | Tensor)):
                raise NotCapturable(f"it returns a {type(leaf).__name__}, which a graph would repeat for every batch")
        self.output_constants, self.output_places = without_tensors(outputs)
        given = {layout(tensor) for tensor in tensors}
        # A replay refreshes only what the graph computes: an input that is handed back would stay the first one.
        return [
            leaf.clone() if _habana.is_view(leaf) or layout(leaf) in given else leaf
            for leaf in outputs
            if isinstance(leaf, Tensor)
        ]


def _independent(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors that cannot be each other's aliases and are no views.

    The bridge matches a graph's inputs by tensor: one that is given twice becomes one input, and a view becomes a
    static input that later calls overwrite, together with what it shows (bridge `hpu/graphs.py`, `replayV3`). Equal
    layouts are the only way for two tensors that are no views to be the same memory.
    """
    seen: set[Layout] = set()
    independent = []
    for tensor in tensors:
        described = layout(tensor)
        independent.append(tensor.clone() if described in seen or _habana.is_view(tensor) else tensor)
        seen.add(described)
    return independent


class _Compiled:
    """One compiled call: the counterpart of `_Graph` where there are no HPU graphs. Its outputs are new tensors."""

    def __init__(self, forward: Callable[..., Any], key: GraphKey, leaves: list[Any], backend: str) -> None:
        self._structure = key.structure
        self._run: Callable[..., Any] = torch.compile(forward, backend=backend, dynamic=False)

    def __call__(self, leaves: list[Any]) -> Any:
        args, kwargs = self._structure.unflatten(leaves)
        return self._run(*args, **kwargs)

    @staticmethod
    @contextmanager
    def capturing() -> Iterator[None]:
        """Surround the first call with this. Our keys bound the number of programs, not dynamo's default of 8."""
        dynamo = torch._dynamo.config
        # Renamed in torch 2.6.
        limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
        with dynamo.patch({limit: 2 * _MAX_KEYS}):
            yield


@dataclass
class _Entry:
    """What is known of one signature of a network's call."""

    run: "_Graph | _Compiled | _Padded | None"
    """None where only the plain forward will do."""
    captured: bool = False
    to_verify: int = 0
    """Calls still to be compared with the plain forward: the capturing one, and the first replays."""
    may_pad: bool = True
    """Whether a larger graph may still stand in."""
    kept: bool = False
    """Whether it was captured in an earlier run, and what it read of Python may have changed since."""
    nbytes: int = 0
    """Device memory that it took, roughly."""

    @property
    def holds_graph(self) -> bool:
        """Whether it owns something that costs memory."""
        return self.captured and not isinstance(self.run, _Padded)


class _Padded:
    """A short batch in a larger graph: its last row is repeated, and the outputs are cut."""

    def __init__(self, graph: _Entry, small: GraphKey, large: GraphKey, rows: tuple[int, int]) -> None:
        self.graph, self.key = graph, large
        self._given, self._captured = rows
        self._places = [
            i for i, (one, other) in enumerate(zip(small.leaves, large.leaves, strict=True)) if one != other
        ]

    def __call__(self, leaves: list[Any]) -> Any:
        leaves = list(leaves)
        for place in self._places:
            leaves[place] = pad_rows(leaves[place], self._captured)
        assert self.graph.run is not None
        outputs, structure = flatten(self.graph.run(leaves))
        return structure.unflatten([self._cut(leaf) for leaf in outputs])

    def _cut(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.dim() or leaf.shape[0] != self._captured:
            raise NotCapturable(
                f"an output of shape {list(leaf.shape)} does not carry the batch dimension of {self._captured}, so a"
                " short batch is not padded"
            )
        return leaf[: self._given]


def _padding(small: GraphKey, large: GraphKey) -> tuple[int, int] | None:
    """The rows of both keys if they differ in nothing else, and `large` has more."""
    if small.modes != large.modes or small.structure != large.structure:
        return None
    rows = set()
    for one, other in zip(small.leaves, large.leaves, strict=True):
        if one == other:
            continue
        if not (isinstance(one, Layout) and isinstance(other, Layout) and one.shape and other.shape):
            return None
        if one.with_rows(other.shape[0]) != other:
            return None
        rows.add((one.shape[0], other.shape[0]))
    if len(rows) != 1:
        return None
    ((fewer, more),) = rows
    return (fewer, more) if 0 < fewer < more else None


class GraphedForward:
    """Stands in for a module's `forward`: one graph per `GraphKey`, the plain forward where a graph will not do.

    The first call with a new key runs plainly and is watched; it also fills caches that the network grows lazily. The
    second captures. It and the first replays are compared with the plain forward on the same inputs.

    Args:
        module: The network.
        name: What messages call it.
        config: `max_graphs`, `graph_memory`, `verify_graphs` and `pad_batch` are used.
        device: Where the network is.
        kind: "hpu_graph", or the backend that `torch.compile` is asked for.
        counts: Where calls are counted.
    """

    _capturing = False  # A graph inside a graph is refused by the bridge: the inner network is part of the outer.

    def __init__(
        self,
        module: nn.Module,
        name: str,
        config: InferenceConfig,
        device: torch.device,
        kind: str,
        counts: GraphCounts,
    ) -> None:
        self._module = module
        self.name = name
        self.forward = module.forward
        """The network's own."""
        self._config = config
        self._device = device
        self._kind = kind
        self._is_graph = kind == "hpu_graph"
        self.counts = counts
        self._entries: OrderedDict[GraphKey, _Entry] = OrderedDict()
        """Least recently used first."""
        self._warned: set[str] = set()
        self._replacing = 0
        """Watched calls that replaced tensors of the network."""
        self._unchecked: KeptState | None = None
        """What the graphs of an earlier run rest on, until the first call of this one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network; the result is the caller's own."""
        if GraphedForward._capturing or torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if self._unchecked is not None:
            # Now, not at the beginning of the run: hooks may change what the network holds.
            if not self._unchecked.holds(self._module):
                self._entries.clear()
            self._unchecked = None
        try:
            key, leaves = GraphKey.of(self._module, args, kwargs, self._device.type)
        except NotCapturable as reason:
            self._warn(str(reason))
            return self._plain(args, kwargs)
        entry = self._entry(key)
        if entry is None:
            return self._watched_call(key, leaves, args, kwargs)
        if entry.run is None:
            return self._plain(args, kwargs)
        if entry.captured and not entry.to_verify:
            return self._replay(entry.run, leaves)
        return self._checked_call(entry, key, leaves, args, kwargs)

    def distrust(self, state: KeptState) -> None:
        """Begin another run: graphs stay if the network still holds `state`, each compared once more all the same."""
        self._unchecked = state
        for entry in self._entries.values():
            entry.kept = True
            if entry.captured:
                entry.to_verify = max(entry.to_verify, self._config.verify_graphs, 1)

    def follow(self, trace: LaneTrace | None) -> None:
        """Record spans of captures and replays from now on, or none."""
        for name, stage in (
            ("_watched_call", Stage.CAPTURE),
            ("_checked_call", Stage.CAPTURE),
            ("_replay", Stage.REPLAY),
        ):
            vars(self).pop(name, None)
            if trace is not None:
                vars(self)[name] = trace.wrap(stage, getattr(self, name))

    def forget_all(self) -> None:
        """Drop every graph and all that is known of signatures."""
        self._entries.clear()
        self._unchecked = None
        self._replacing = 0

    @property
    def holds_graphs(self) -> bool:
        """Whether there is anything to keep."""
        return any(entry.holds_graph for entry in self._entries.values())

    def _entry(self, key: GraphKey) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._use(key, entry)
        if self._config.pad_batch and (entry is None or (not entry.captured and entry.run and entry.may_pad)):
            larger = [
                (rows, other, graph)
                for other, graph in self._entries.items()
                if graph.holds_graph and not graph.to_verify and (rows := _padding(key, other))
            ]
            if larger:
                rows, other, graph = min(larger, key=lambda each: each[0])
                padded = _Padded(graph, key, other, rows)
                entry = _Entry(padded, captured=True, to_verify=max(1, self._config.verify_graphs))
                self._remember(key, entry)
        return entry

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.counts.plain_calls += 1
        return self.forward(*args, **kwargs)

    def _watched_call(self, key: GraphKey, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run plainly, and find out whether a graph would do the same."""
        self._look_for_data_among_values(key)
        before = tensors_kept_by(self._module)
        with HostReads(leaves, before.values()) as reads:
            output = self._plain(args, kwargs)
        # torch.compile finds by itself where Python reads the device, but verification would run a change twice.
        reason = reads.changed or ((reads.found or _unfit(self._module)) if self._is_graph else "")
        if not reason and replaced(before, tensors_kept_by(self._module)):
            # It may be a cache that is made in the first call, so the next one is watched again.
            self._replacing += 1
            if self._replacing <= _PATIENCE:
                return output
            reason = "it keeps replacing tensors that it holds, so no call is like another"
        if reason:
            self._warn(reason)
        self._remember(key, _Entry(None) if reason else self._uncaptured(key, leaves))
        return output

    def _uncaptured(self, key: GraphKey, leaves: list[Any], *, may_pad: bool = True) -> _Entry:
        run: _Graph | _Compiled
        run = _Graph(self.forward, key, leaves) if self._is_graph else _Compiled(self.forward, key, leaves, self._kind)
        verify = self._config.verify_graphs
        return _Entry(run, to_verify=verify + 1 if verify else 0, may_pad=may_pad)

    def _checked_call(
        self, entry: _Entry, key: GraphKey, leaves: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Capture or replay, and compare with the plain forward while there is something to verify."""
        expected = self._plain(args, kwargs) if entry.to_verify else None
        assert entry.run is not None
        output, reason = None, ""
        if entry.captured:
            try:
                output = self._replay(entry.run, leaves)
            except NotCapturable as unfit:
                reason = str(unfit)
        else:
            output, reason = self._capture(entry, leaves)
        if not reason and entry.to_verify:
            entry.to_verify -= 1
            self.counts.verified += 1
            if found := difference(output, expected):
                reason = (
                    f"a replay differs from the plain forward ({found}). It may read a Python value that changes,"
                    " or draw random numbers; a graph would repeat those of the call that was captured"
                )
                if isinstance(entry.run, _Padded):
                    reason = f"rows added to a short batch change the others ({found})"
            output = expected
        if not reason:
            return output
        if entry.kept:
            self._forget(key)  # What was captured in an earlier run is out of date; that is no reason for a warning.
        elif isinstance(entry.run, _Padded):
            self._warn(reason)
            self._entries[key] = self._uncaptured(key, leaves, may_pad=False)
        else:
            self._warn(reason)
            self._entries[key] = _Entry(None)
        # An error of the network itself is raised again by this call, and so reaches the user as it is.
        return expected if expected is not None else self._plain(args, kwargs)

    def _replay(self, run: "_Graph | _Compiled | _Padded", leaves: list[Any]) -> Any:
        self.counts.replays += 1
        self.counts.padded += isinstance(run, _Padded)
        return run(leaves)

    def _capture(self, entry: _Entry, leaves: list[Any]) -> tuple[Any, str]:
        """The output of the capturing call, or why there is none."""
        assert isinstance(entry.run, _Graph | _Compiled)
        self._make_room(self._config.max_graphs - 1)
        before = self._memory_in_use()
        GraphedForward._capturing = True
        try:
            with entry.run.capturing():
                output = entry.run(leaves)
        except Exception as error:
            what = "capturing" if self._is_graph else "compiling"
            # Dynamo appends advice to its own developers.
            message = " ".join(str(error).split("\n\n")[0].split())
            return None, f"{what} it failed ({type(error).__name__}: {message})"
        finally:
            GraphedForward._capturing = False
        entry.captured = True
        self.counts.captures += 1
        entry.nbytes = max(0, self._memory_in_use() - before)
        if self._config.graph_memory is not None and entry.nbytes > self._config.graph_memory:
            return None, f"it alone takes {entry.nbytes} bytes, and `graph_memory` is {self._config.graph_memory}"
        self._make_room(self._config.max_graphs)
        return output, ""

    def _memory_in_use(self) -> int:
        """Bytes, if anybody asks: waits for the device."""
        if self._config.graph_memory is None or not self._is_graph:
            return 0
        _habana.mark_step()
        _habana.synchronize()
        return int(_habana.memory_stats(self._device)["InUse"])

    def _make_room(self, graphs: int) -> None:
        """Drop the graphs that were used least recently until the bounds hold."""
        held = [(key, entry) for key, entry in self._entries.items() if entry.holds_graph]
        total = sum(entry.nbytes for _, entry in held)
        budget = self._config.graph_memory
        while held and (len(held) > graphs or (budget is not None and total > budget)):
            key, entry = held.pop(0)
            total -= entry.nbytes
            self.counts.evictions += 1
            self._forget(key)

    def _forget(self, key: GraphKey) -> None:
        """Drop a graph, with the paddings that rest on it."""
        if self._is_graph:
            _habana.synchronize()  # Its last replay may still be running.
        gone = self._entries.pop(key)
        for other, entry in list(self._entries.items()):
            if isinstance(entry.run, _Padded) and entry.run.graph is gone:
                del self._entries[other]

    def _use(self, key: GraphKey, entry: _Entry) -> None:
        """Make a key the most recently used, with that of the graph that its padding rests on."""
        if isinstance(entry.run, _Padded):
            self._entries.move_to_end(entry.run.key)
        self._entries.move_to_end(key)

    def _remember(self, key: GraphKey, entry: _Entry) -> None:
        self._entries[key] = entry
        self._use(key, entry)
        if len(self._entries) > _MAX_KEYS:
            oldest = next(iter(self._entries))
            self.counts.evictions += self._entries[oldest].holds_graph
            self._forget(oldest)

    def _look_for_data_among_values(self, key: GraphKey) -> None:
        if "values" in self._warned or not key.values:
            return
        alike = [other.values for other in self._entries if other.without_values == key.without_values]
        if len(alike) + 1 >= _MANY_VALUES:
            self._warned.add("values")
            places = range(len(key.values))
            changing = next((place for place in places if len({each[place] for each in alike}) > 1), 0)
            examples = ", ".join(repr(values[changing]) for values in alike)
            rank_zero_warn(
                f"The network `{self.name}` is given Python values that keep changing ({examples}, ...). Each"
                " needs a graph of its own. Pass them as tensors, or do not pass them to the network."
            )

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            what = "an HPU graph" if self._is_graph else "torch.compile"
            rank_zero_warn(f"The network `{self.name}` runs without {what}: {reason}.")


def _unfit(module: nn.Module) -> str:
    """Why a module must not be captured, by its looks."""
    for name, child in module.named_modules():
        hooks = [*child._forward_hooks.values(), *child._forward_pre_hooks.values()]
        # In lazy mode the bridge puts hooks of its own on every module (bridge `torch_overwrites.py`).
        own = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("habana_frameworks")]
        if name and own:
            return f"its part `{name}` has forward hooks, which a replay would not call; remove them"
    return ""
