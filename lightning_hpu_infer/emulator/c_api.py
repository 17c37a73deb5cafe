"""The names of Habana's C extension modules, `_hpu_C` and `_core_C`, on which the Python layer is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_hpu_infer.emulator import runtime, streams
from lightning_hpu_infer.emulator.compiled import CompiledGraph
from lightning_hpu_infer.emulator.graph import HPUGraph, mark_user_inputs, view_hash
from lightning_hpu_infer.emulator.timeline import DeviceSpan

Event = streams.EventState
DEVICE_NAME = "GAUDI2"
MEMORY_LIMIT = 96 << 30
"""Bytes of device memory reported, as many as a Gaudi 2 has."""

new_stream = streams.new_stream
synchronize_stream = streams.synchronize
query_stream = streams.query
mark_user_inputs = mark_user_inputs
get_view_hash = view_hash


def is_lazy() -> bool:
    """Tell whether ops are accumulated."""
    return runtime.current().config.lazy


def device_count() -> int:
    """Return how many devices the configuration names."""
    return runtime.current().config.num_devices


def step_marker() -> None:
    """Launch what is pending, as an explicit ``mark_step`` does."""
    rt = runtime.current()
    rt.touch()
    rt.counters.add("mark_steps")
    rt.notify("mark_step")
    rt.flush("mark_step")


def synchronize_device() -> None:
    """Launch what is pending and wait for the device."""
    rt = runtime.current()
    rt.touch()
    rt.synchronize()


def current_stream() -> int:
    """Return the id of the current stream."""
    return runtime.current().stream_id


def set_current_stream(stream_id: int) -> None:
    """Make another stream current."""
    runtime.current().set_stream(stream_id)


def manual_seed(seed: int) -> None:
    """Seed the device's random state."""
    runtime.current().seed(seed)


def get_rng_state() -> torch.Tensor:
    """Return the device's random state, after everything queued has run."""
    rt = runtime.current()
    rt.synchronize()
    return rt.generator.get_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Set the device's random state."""
    rt = runtime.current()
    rt.synchronize()
    rt.generator.set_state(state)


def initial_seed() -> int:
    """Return the last seed."""
    rt = runtime.current()
    rt.synchronize()
    return rt.generator.initial_seed()


def capture_begin(graph: HPUGraph, dry_run: bool) -> None:
    """Start to record into `graph`."""
    graph.capture_begin(dry_run=dry_run)


def capture_end(graph: HPUGraph) -> None:
    """Stop recording."""
    graph.capture_end()


def replay(graph: HPUGraph, asynchronous: bool) -> None:
    """Replay with the static inputs; both values of `asynchronous` return before the device is done."""
    graph.replay()


def replayV2(graph: HPUGraph, static: list[Any], tensors: list[Any], asynchronous: bool) -> None:
    """Copy into the static inputs, then replay."""
    for destination, source in zip(static, tensors, strict=True):
        destination.copy_(source)
    graph.replay()


def replayV3(graph: HPUGraph, tensors: list[Any], asynchronous: bool) -> None:
    """Replay on the caller's tensors."""
    graph.replay_with(tensors)


def mark_user_outputs(graph: HPUGraph, tensors: list[Any]) -> None:
    """Name the outputs to keep."""
    graph.mark_user_outputs(tensors)


def clear_inputs(graph: HPUGraph) -> None:
    """Drop the memory of the matched inputs."""
    graph.clear_inputs()


def destroy(graph: HPUGraph) -> None:
    """Free the graph."""
    graph.destroy()


def get_user_input_match_indices(graph: HPUGraph) -> list[int]:
    """Return the inputs that replayV3 can bind."""
    return graph.match_indices()


def count_graph_fallback() -> None:
    """Count a wrapped call that ran without a graph; the real bridge has no such counter."""
    runtime.current().counters.add("graph_fallbacks")


def compile_graph(module: torch.fx.GraphModule) -> Callable[..., Sequence[Any]]:
    """Compile a graph of dynamo's."""
    return CompiledGraph(module).__call__


def memory_stats() -> dict[str, int]:
    """Return the counters under the bridge's names (bridge: bindings.cpp:211-228)."""
    memory = runtime.current().memory
    return {
        "Limit": MEMORY_LIMIT,
        "InUse": memory.in_use,
        "MaxInUse": memory.peak,
        "NumAllocs": memory.allocs,
        "NumFrees": memory.frees,
        "ActiveAllocs": memory.allocs - memory.frees,
        "MaxAllocSize": memory.largest,
        "TotalSystemAllocs": memory.allocs,
        "TotalSystemFrees": memory.frees,
        "TotalActiveAllocs": memory.allocs - memory.frees,
    }


def reset_peak_memory() -> None:
    """Start a new peak at what is in use now."""
    memory = runtime.current().memory
    memory.peak = memory.in_use


def start_timeline() -> None:
    """Record when the device works; not a name of the bridge."""
    runtime.current().timeline.start()


def stop_timeline() -> list[DeviceSpan]:
    """Return what was recorded; not a name of the bridge."""
    return runtime.current().timeline.stop()


def add_listener(listener: runtime.Listener) -> None:
    """Call `listener` with events (compilations, cache hits and misses, fallbacks, step markers)."""
    runtime.current().listeners.append(listener)
