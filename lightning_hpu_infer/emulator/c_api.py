"""The names of Habana's C extension module ``_hpu_C``: device, streams, memory, settings and graphs.

Names and arguments are those of the bridge's csrc/bindings.cpp, csrc/Module.cpp, csrc/Stream.cpp and csrc/Event.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lightning_hpu_infer.emulator import runtime, streams
from lightning_hpu_infer.emulator.graph import HPUGraph as HPUGraph
from lightning_hpu_infer.emulator.graph import view_hash
from lightning_hpu_infer.emulator.streams import HpuEventBase, HpuStreamBase

MEMORY_LIMIT = 96 << 30
"""Bytes of device memory reported, as many as a Gaudi 2 has."""

_HpuStreamBase = HpuStreamBase
_HpuEventBase = HpuEventBase
get_view_hash = view_hash

# Device


def init() -> None:
    """Acquire the device."""
    runtime.current().touch()


def cleanup() -> None:
    """Wait for threads that gather ops; here there are none."""


def device_count() -> int:
    """Return how many devices the configuration names; 0 to a program that has kept the module after `uninstall`."""
    rt = runtime.installed()
    return 0 if rt is None else rt.config.num_devices


def current_device() -> int:
    """Return 0: a process has one device, with any module id."""
    return 0


def synchronize_device() -> None:
    """Launch what is pending and wait for the device."""
    rt = runtime.current()
    rt.touch()
    rt.synchronize()


def get_device_name(device: int) -> str:
    """Return the name of the emulated generation."""
    return "GAUDI2"


def get_device_capability() -> str:
    """Return the version of the (absent) driver."""
    return "0.0.0"


def get_device_properties(device: int) -> str:
    """Return text, as the bridge does (bridge: device.cpp:1810-1831); of its fields only those that have a meaning."""
    return f"(dramSize={MEMORY_LIMIT}, dramEnabled=1, device_id={device})"


# Streams


def _hpu_getCurrentStream(device_index: int) -> tuple[int, int, int]:
    return runtime.current().stream_id, 0, streams.DEVICE_TYPE


def _hpu_getCurrentRawStream(device_index: int) -> int:
    return runtime.current().stream_id


def _hpu_getDefaultStream(device_index: int) -> tuple[int, int, int]:
    return 0, 0, streams.DEVICE_TYPE


def _hpu_getStreamInfo(stream_id: int = 0, device_index: int = 0, device_type: int = 0) -> tuple[torch.device, int]:
    return torch.device("hpu", device_index), stream_id


def _hpu_setStream(stream_id: int = 0, device_index: int = 0, device_type: int = 0) -> None:
    streams.set_current(stream_id)


def record_stream(tensor: torch.Tensor, stream_id: int, device_index: int, device_type: int) -> None:
    """Note that a stream uses the tensor; memory here lives as long as work on it does."""


# Memory


def get_mem_stats(device: int) -> dict[str, int]:
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


def get_memory_summary(device: int) -> str:
    """Return the counters as text."""
    return "".join(f"  {name + ':':19}{value:20}\n" for name, value in get_mem_stats(device).items())


def get_extended_memory_summary() -> dict[str, int]:
    """Return what is known of memory under names of its own; the emulation has no workspace."""
    stats = get_mem_stats(0)
    return {
        "limit": stats["Limit"],
        "in_use": stats["InUse"],
        "persistent": stats["InUse"],
        "workspace": 0,
        "max_in_use": stats["MaxInUse"],
        "num_allocs": stats["NumAllocs"],
        "num_free": stats["NumFrees"],
        "max_alloc_size": stats["MaxAllocSize"],
        "active_allocs": stats["ActiveAllocs"],
    }


def get_hlml_shared_object_name(device: int) -> str:
    """Return no name: nothing is reported to Habana's management library."""
    return ""


def reset_peak_memory_stats(device: int) -> None:
    """Start a new peak at what is in use now; a Gaudi shows 0 until the next allocation."""
    memory = runtime.current().memory
    memory.peak = memory.in_use


def clear_memory_stats(device: int) -> None:
    """Start a new peak, and count allocations anew (bridge: CoalescedStringentPoolAllocator.cpp:1342-1350)."""
    memory = runtime.current().memory
    memory.peak, memory.allocs, memory.frees, memory.largest = memory.in_use, 0, 0, 0


# Settings: kept and shown where the bridge shows them; none changes the emulation.


def _switch(name: str) -> tuple[Callable[[], None], Callable[[], None]]:
    def enable() -> None:
        runtime.current().settings[name] = True

    def disable() -> None:
        runtime.current().settings[name] = False

    return enable, disable


enable_dynamic_shape, disable_dynamic_shape = _switch("dynamic_shape")
enable_optim_output_sif, disable_optim_output_sif = _switch("optim_output_sif")
enable_inference_mode, disable_inference_mode = _switch("inference_mode")
enable_quantization, disable_quantization = _switch("quantization")
enable_matmul3d_2d_reshape, disable_matmul3d_2d_reshape = _switch("matmul3d_2d_reshape")


def get_dynamic_shape_status() -> bool:
    """Tell whether shapes are refined for changing sizes; every capture and replay ends that (bridge: HPUGraph.cpp)."""
    return runtime.current().settings["dynamic_shape"]


def setDeterministic(value: bool) -> None:
    """Ask for kernels that give the same bits each time, as the CPU's do."""
    runtime.current().settings["deterministic"] = value


def getDeterministic() -> bool:
    """Tell what `setDeterministic` was told."""
    return runtime.current().settings["deterministic"]


def enable_recompute_FSDPA(recompute: bool) -> None:
    """Choose how fused attention keeps what its backward needs."""
    runtime.current().settings["recompute_sdp"] = recompute


def is_recompute_FSDPA_enabled() -> bool:
    """Tell what `enable_recompute_FSDPA` was told."""
    return runtime.current().settings["recompute_sdp"]


def enable_const_section_serialization(path: str, clear_path: bool, use_compression: bool) -> None:
    """Name a folder for constants of recipes, of which there are none."""


def set_autocast_hpu_enabled(enabled: bool) -> None:
    """Switch autocast."""
    torch.set_autocast_enabled("hpu", enabled is True)


def is_autocast_hpu_enabled() -> bool:
    """Tell whether autocast is on."""
    return torch.is_autocast_enabled("hpu")


def set_autocast_hpu_dtype(dtype: torch.dtype) -> None:
    """Set autocast's dtype."""
    torch.set_autocast_dtype("hpu", dtype)


def get_autocast_hpu_dtype() -> torch.dtype:
    """Return autocast's dtype."""
    return torch.get_autocast_dtype("hpu")


# Graphs


def capture_begin(graph: HPUGraph, dry_run: bool = False) -> None:
    """Start to record into `graph`."""
    graph.capture_begin(dry_run=dry_run)


def capture_end(graph: HPUGraph) -> None:
    """Stop recording; does nothing if `graph` does not record."""
    graph.capture_end()


def replay(graph: HPUGraph, asynchronous: bool) -> None:
    """Replay with the static inputs; both values of `asynchronous` return before the device is done."""
    graph.replay()


def replayV2(
    graph: HPUGraph, static: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], asynchronous: bool
) -> None:
    """Copy into the static inputs, then replay; the bridge binds the new tensors instead."""
    for destination, source in zip(static, tensors, strict=True):
        destination.copy_(source)
    graph.replay()


def replayV3(graph: HPUGraph, tensors: Sequence[torch.Tensor], asynchronous: bool) -> None:
    """Replay on the caller's tensors."""
    graph.replay_with(tensors)


def mark_user_inputs(graph: HPUGraph, tensors: Sequence[torch.Tensor]) -> None:
    """Name the caller's tensors, while `graph` records."""
    graph.mark_user_inputs(tensors)


def mark_user_outputs(graph: HPUGraph, tensors: Sequence[torch.Tensor]) -> None:
    """Name the outputs to keep."""
    graph.mark_user_outputs(tensors)


def get_user_input_match_indices(graph: HPUGraph) -> set[int]:
    """Return the inputs that `replayV3` binds."""
    return graph.match_indices()


def clear_inputs(graph: HPUGraph) -> None:
    """Drop inputs that the graph writes."""
    graph.clear_inputs()


def destroy(graph: HPUGraph) -> None:
    """Free the graph; ends any capture."""
    graph.destroy()
