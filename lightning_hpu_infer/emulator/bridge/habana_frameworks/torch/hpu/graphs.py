"""HPU graphs: capture a function's device work once and replay it."""

from __future__ import annotations

import collections
import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from habana_frameworks.torch import _core_C, _hpu_C, hpu
from habana_frameworks.torch.hpu import streams

__all__ = [
    "CachedParams",
    "HPUGraph",
    "ModuleCacher",
    "copy_to",
    "extract_tensors",
    "get_user_input_tensor_list",
    "graph",
    "input_hash",
    "is_current_stream_capturing",
    "make_graphed_callables",
    "wrap_in_hpu_graph",
    "wrap_in_hpu_graph_func",
    "wrapped_hpugraph_forward",
]


class HPUGraph:
    """A recorded piece of device work."""

    def __init__(self) -> None:
        self.hpu_graph = _hpu_C.HPUGraph()

    def capture_begin(self, dry_run: bool = False) -> None:
        """Start to record; with `dry_run` nothing is launched."""
        _hpu_C.capture_begin(self.hpu_graph, dry_run)

    def capture_end(self) -> None:
        """Stop recording."""
        _hpu_C.capture_end(self.hpu_graph)

    def replay(self, asynchronous: bool = False) -> None:
        """Run again on the static inputs."""
        _hpu_C.replay(self.hpu_graph, asynchronous)

    def replayV2(self, static_tlist: Sequence[Any], tlist: Sequence[Any], asynchronous: bool = False) -> None:
        """Copy `tlist` into the static inputs and run."""
        _hpu_C.replayV2(self.hpu_graph, static_tlist, tlist, asynchronous)

    def replayV3(self, tlistI: Sequence[Any], asynchronous: bool = False) -> None:
        """Run on the tensors instead of the marked inputs that matched."""
        _hpu_C.replayV3(self.hpu_graph, tlistI, asynchronous)

    def clear_inputs(self) -> None:
        """Drop the memory of the matched inputs; synchronize first."""
        _hpu_C.clear_inputs(self.hpu_graph)

    def mark_user_outputs(self, outputs: Sequence[Any]) -> None:
        """Name the outputs to keep."""
        _hpu_C.mark_user_outputs(self.hpu_graph, outputs)

    def mark_user_inputs(self, inputs: Sequence[Any]) -> None:
        """Name the caller's tensors, while capturing."""
        _hpu_C.mark_user_inputs(self.hpu_graph, inputs)

    def get_user_input_match_indices(self) -> set[int]:
        """Return the marked inputs that the graph reads directly."""
        return _hpu_C.get_user_input_match_indices(self.hpu_graph)

    def reset(self) -> None:
        """Free what was recorded; ends any capture that is going on."""
        _hpu_C.destroy(self.hpu_graph)

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not _ending():  # the modules that this needs may be gone, `sys` too
            self.reset()


class graph:
    """Context manager that records its body into an `HPUGraph`, on a side stream unless one is given."""

    default_capture_stream: streams.Stream | None = None

    def __init__(self, hpu_graph: HPUGraph, stream: streams.Stream | None = None, dry_run: bool = False) -> None:
        if stream is None:
            if type(self).default_capture_stream is None:
                type(self).default_capture_stream = streams.Stream()
            stream = type(self).default_capture_stream
        self.capture_stream = stream
        self.stream_ctx = streams.stream(stream)
        self.hpu_graph = hpu_graph
        self.dry_run = dry_run

    def __enter__(self) -> None:
        _hpu_C.synchronize_device()
        gc.collect()  # a graph that dies during the capture would end it
        self.stream_ctx.__enter__()
        self.capture_stream.is_capture = True
        self.hpu_graph.capture_begin(dry_run=self.dry_run)

    def __exit__(self, *exc: Any) -> None:
        self.hpu_graph.capture_end()
        self.capture_stream.is_capture = False
        self.stream_ctx.__exit__(*exc)


def is_current_stream_capturing() -> bool:
    """Tell whether the `graph` context manager records on the current stream."""
    return getattr(streams.current_stream(), "is_capture", False)


class CachedParams:
    """What the wrapper keeps for one key."""

    def __init__(
        self,
        graph_inputs: Any,
        graph_outputs: Any,
        graph: HPUGraph,
        out_tinfo_list: Any = None,
        asynchronous: bool = False,
    ) -> None:
        self.graph_inputs = graph_inputs
        self.graph_outputs = graph_outputs
        self.graph = graph
        self.out_tinfo_list = out_tinfo_list
        self.asynchronous = asynchronous


def input_hash(obj: Any) -> int:
    """Return the cache key of call arguments, with the bridge's blind spots.

    dtype and strides are not in it, equal hashes of different values collide (``1 == True``, ``-1`` and ``-2``), and
    objects other than dicts, lists, tuples and tensors count by their ``hash`` (bridge: graphs.py:488-499).
    """
    autocast = _hpu_C.is_autocast_hpu_enabled()
    if isinstance(obj, dict):
        return input_hash(tuple(obj.items()))
    if isinstance(obj, (list, tuple)) and not isinstance(obj, torch.Size):
        return hash((tuple(map(input_hash, obj)), autocast))
    if isinstance(obj, torch.Tensor):
        return hash((obj.shape, _hpu_C.get_view_hash(obj), autocast))
    if isinstance(obj, collections.UserDict):
        # The rows of a tensor are new objects each time, and hash by identity: such a call hardly ever hits.
        return hash(tuple((key, tuple(value)) for key, value in obj.items()))
    return hash((obj, autocast))


def copy_to(dst: Any, src: Any) -> None:
    """Copy the tensors of `src` into those of `dst`, which must have the same types; other leaves are ignored."""
    assert type(dst) is type(src), f"{type(dst)} is not {type(src)}"
    if isinstance(dst, dict):
        for (dst_key, dst_value), (src_key, src_value) in zip(dst.items(), src.items(), strict=False):
            assert dst_key == src_key, f"{dst_key!r} is not {src_key!r}"
            copy_to(dst_value, src_value)
    elif isinstance(dst, (list, tuple)):
        for dst_value, src_value in zip(dst, src, strict=False):
            copy_to(dst_value, src_value)
    elif isinstance(dst, torch.Tensor):
        dst.copy_(src, non_blocking=True)


def get_user_input_tensor_list(inputs: Any, tlist: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return `tlist` and the tensors in dicts, lists and tuples."""
    if isinstance(inputs, torch.Tensor):
        return (*tlist, inputs)
    items = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (list, tuple)) else ()
    for item in items:
        tlist = get_user_input_tensor_list(item, tlist)
    return tlist


def extract_tensors(data: Any) -> list[torch.Tensor]:
    """Return the tensors of a function's result, also those in the attributes of objects."""
    if isinstance(data, torch.Tensor):
        return [data]
    if isinstance(data, dict):
        items = list(data.values())
    else:
        items = list(data) if isinstance(data, (list, tuple)) else list(getattr(data, "__dict__", {}).values())
    return [tensor for item in items for tensor in extract_tensors(item)]


def wrapped_hpugraph_forward(
    cache: dict[int, CachedParams],
    stream: streams.Stream,
    orig_fwd: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    disable_tensor_cache: bool = False,
    asynchronous: bool = False,
    dry_run: bool = False,
    max_graphs: int | None = None,
) -> Any:
    """Call `orig_fwd` through the cache of graphs.

    The result is the same object on every call with one key, and each call overwrites its tensors.
    """
    warmup = kwargs.pop("warmup_mode", False)
    if kwargs.pop("bypass_hpu_graphs", False):
        return orig_fwd(*args, **kwargs)
    inputs = (args, kwargs)
    key = input_hash(inputs)
    extra_outputs = extract_tensors(kwargs.pop("cache_tensors_list", []))
    if (override := os.getenv("PT_HPUGRAPH_DISABLE_TENSOR_CACHE")) is not None:
        disable_tensor_cache = override == "1"
    cached = cache.get(key)
    if cached is None:
        if max_graphs is not None and len(cache) == max_graphs:
            return orig_fwd(*args, **kwargs)
        # On purpose without try/finally: the bridge leaves its capture state as it is after a failure (graphs.py:603).
        with streams.stream(stream):
            recorded = hpu.HPUGraph()  # not there in eager mode, as on the bridge (graphs.py:604, hpu/__init__.py:45)
            recorded.capture_begin(dry_run=dry_run or disable_tensor_cache)
            given = get_user_input_tensor_list(inputs, ())
            if disable_tensor_cache:
                recorded.mark_user_inputs(given)
            outputs = orig_fwd(*args, **kwargs)
            recorded.capture_end()
            static: Any = inputs
            if disable_tensor_cache:
                recorded.mark_user_outputs(extra_outputs + extract_tensors(outputs))
                static = _unmatched(recorded, given)
                recorded.replayV3(given, asynchronous)
            elif dry_run:
                recorded.replay(asynchronous)
            cache[key] = CachedParams(static, outputs, recorded, asynchronous=asynchronous)
        return outputs
    if warmup:
        _core_C._mark_step()
    elif disable_tensor_cache:
        given = get_user_input_tensor_list(inputs, ())
        copy_to(cached.graph_inputs, _unmatched(cached.graph, given))
        cached.graph.replayV3(given, cached.asynchronous)
    else:
        copy_to(cached.graph_inputs, inputs)
        cached.graph.replay(cached.asynchronous)
    return cached.graph_outputs


def _unmatched(graph: HPUGraph, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the inputs that a replay does not bind, and that are therefore copied into static ones."""
    matched = graph.get_user_input_match_indices()
    return tuple(tensor for index, tensor in enumerate(tensors) if index not in matched)


def wrap_in_hpu_graph_func(
    func: Callable[..., Any],
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    dry_run: bool = False,
    max_graphs: int | None = None,
) -> Callable[..., Any]:
    """Return a function that captures `func` once per key and then replays it."""
    cache: dict[int, CachedParams] = {}
    stream = streams.default_stream()

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return wrapped_hpugraph_forward(
            cache, stream, func, args, kwargs, disable_tensor_cache, asynchronous, dry_run, max_graphs
        )

    return wrapper


def wrap_in_hpu_graph(
    module: torch.nn.Module,
    asynchronous: bool = False,
    disable_tensor_cache: bool = False,
    dry_run: bool = False,
    max_graphs: int | None = None,
) -> torch.nn.Module:
    """Replace ``module.forward`` by a captured one, in place; only ``del module.forward`` undoes it."""
    cache: dict[int, CachedParams] = {}
    stream = streams.default_stream()
    orig_fwd = module.forward

    @functools.wraps(orig_fwd)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return wrapped_hpugraph_forward(
            cache, stream, orig_fwd, args, kwargs, disable_tensor_cache, asynchronous, dry_run, max_graphs
        )

    def clear_inputs() -> None:
        for cached in cache.values():
            cached.graph.clear_inputs()

    module.forward = forward
    module.clear_inputs = clear_inputs
    module.clear_cache = cache.clear
    return module


def make_graphed_callables(*args: Any, **kwargs: Any) -> Any:
    """Not emulated: it always captures a backward."""
    raise NotImplementedError("make_graphed_callables records a backward and is not emulated; use wrap_in_hpu_graph")


class ModuleCacher:
    """Not emulated: it caches in training only, and in eval runs the plain forward."""

    def __init__(self, max_graphs: int = 10) -> None:
        raise NotImplementedError("ModuleCacher caches in training only and is not emulated; use wrap_in_hpu_graph")
