"""The one door to Habana's PyTorch bridge. Nothing else imports `habana_frameworks`.

Where `lightning_hpu_infer.emulator` is installed, the same imports find its modules, so nothing here knows of it.
Imports stay inside functions: importing the bridge opens the device.
"""

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

DEVICE_TYPE = "hpu"


def is_installed() -> bool:
    """Whether `habana_frameworks` can be imported, Habana's or the emulator's."""
    return find_spec("habana_frameworks") is not None


def is_available() -> bool:
    """Whether this process can compute on an HPU."""
    return is_installed() and bool(_hpu().is_available())


def device_count() -> int:
    """Devices that the bridge sees; 0 where there is no bridge."""
    return int(_hpu().device_count()) if is_installed() else 0


def memory_stats(device: torch.device) -> dict[str, Any]:
    """Device memory by the bridge's names (`InUse`, `MaxInUse`, `Limit`, ...), in bytes."""
    return dict(_hpu().memory_stats(device))


def is_lazy() -> bool:
    """Whether ops are accumulated until a step marker. Decided by the bridge when it was imported."""
    from habana_frameworks.torch.utils.internal import is_lazy

    return bool(is_lazy())


def mark_step() -> None:
    """Launch what was accumulated. In lazy mode nothing runs on the device before this or an implicit flush."""
    from habana_frameworks.torch import core

    core.mark_step()


def synchronize() -> None:
    """Wait until the device has done all that was launched."""
    _hpu().synchronize()


def record_event() -> Any:
    """An event behind all that was launched so far; its `synchronize()` waits with the GIL released."""
    event = _hpu().Event()
    event.record()
    return event


def start_timeline() -> None:
    """Record what the device does, where it can tell: the emulator can, the bridge leaves it to its profiler."""
    if (timeline := _timeline()) is not None:
        timeline.start()


def stop_timeline() -> list[Any]:
    """What the device did: `queue`, `kind`, `start` and `end` in seconds of `time.perf_counter`, `nbytes`."""
    timeline = _timeline()
    return [] if timeline is None else list(timeline.stop())


def _timeline() -> Any:
    if not is_installed() or find_spec("habana_frameworks.torch.emulator_timeline") is None:
        return None
    from habana_frameworks.torch import emulator_timeline

    return emulator_timeline


def is_emulated() -> bool:
    """Whether the bridge is the emulator's."""
    return _timeline() is not None


def initialize_distributed(world_size: int, rank: int, local_rank: int) -> None:
    """Choose this process's device and register the backend `hccl` for it.

    Call before the process group is made, and before the device is used: each process has one device.
    """
    from habana_frameworks.torch.distributed import hccl

    hccl.initialize_distributed_hpu(world_size=world_size, rank=rank, local_rank=local_rank)


def is_view(tensor: Tensor) -> bool:
    """Whether a device tensor may be a view that was not written out yet, and so cannot be a graph's input by itself.

    Asks what the bridge's own key asks (bridge `csrc/bindings.cpp`); a bridge without that answer gets "yes".
    """
    from habana_frameworks.torch import _hpu_C

    view_hash = getattr(_hpu_C, "get_view_hash", None)
    return view_hash is None or bool(view_hash(tensor))


@contextmanager
def without_naming_hooks(root: nn.Module, others: Callable[[object], bool] | None = None) -> Iterator[None]:
    """Take the bridge's debugging hooks off all parts of a model, and put them on again.

    In lazy mode the bridge registers hooks on every module that tell its name to a debugger. They would split a traced
    step at every module (bridge 1.19 `core/torch_overwrites.py`, which says so itself).

    Args:
        root: The model.
        others: Tells which other hooks do nothing but name modules.
    """

    def names(hook: object) -> bool:
        return _is_bridges(hook) or (others is not None and others(hook))

    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in root.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            found = {key: hook for key, hook in hooks.items() if names(hook)}
            if found:
                taken.append((hooks, dict(hooks)))
                for key in found:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in taken:
            now = dict(hooks)
            hooks.clear()
            # In their order, without those that were removed meanwhile, and with those that were added.
            hooks.update({key: hook for key, hook in before.items() if key in now or names(hook)})
            hooks.update({key: hook for key, hook in now.items() if key not in before})


def _is_bridges(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("habana_frameworks")


def graphed(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Wrap a function of device tensors so that it is captured on its first call and replayed afterwards.

    The returned tensors belong to the graph: the next replay overwrites them, also through `detach()` and views
    (bridge `hpu/graphs.py`: every call returns the object of the capturing call). The caller must copy what it keeps.

    `disable_tensor_cache=True` because the other mode keeps the tensors of the first call as static inputs and
    overwrites them on every later call, and those may be a batch that somebody still holds.

    Raises:
        RuntimeError: If the environment takes that choice away.
    """
    # The variable beats the argument (bridge `hpu/graphs.py`).
    if os.environ.get("PT_HPUGRAPH_DISABLE_TENSOR_CACHE", "1") != "1":
        raise RuntimeError(
            "PT_HPUGRAPH_DISABLE_TENSOR_CACHE is set to"
            f" {os.environ['PT_HPUGRAPH_DISABLE_TENSOR_CACHE']!r}, which lets graphs overwrite your batches. Unset it,"
            " or pass `hpu_graphs=False`."
        )
    wrap: Callable[..., Callable[..., list[Tensor]]] = _hpu().wrap_in_hpu_graph_func
    return wrap(function, disable_tensor_cache=True)


def reset_capture(error: BaseException) -> None:
    """Clear the bridge's process-wide capture flags after `error` ended a capture.

    They stay set until some graph is freed, and `dry_run` until the end of some later capture (bridge 1.19
    `HPUGraph.cpp`). The failed graph should be freed here, since it would end whatever is captured by then. The error's
    tracebacks keep it alive through the locals of their frames, so these are dropped; the tracebacks stay readable.

    Never raises: what the user should see is `error`.
    """
    for part in _chain(error):
        traceback.clear_frames(part.__traceback__)
    gc.collect()
    graph = _hpu().HPUGraph()
    try:
        graph.reset()  # frees no other graph, but clears the flags even if the failed one is still alive
        graph.capture_begin()
        graph.capture_end()
    except RuntimeError as problem:
        rank_zero_warn(
            f"The bridge's state could not be cleared after a capture that failed ({problem}); later captures in this"
            " process may fail as well. Pass `hpu_graphs=False` if they do."
        )


def _chain(error: BaseException) -> list[BaseException]:
    """An error with all that led to it: causes and contexts, each once."""
    found: list[BaseException] = []
    rest: list[BaseException | None] = [error]
    while rest:
        part = rest.pop()
        if part is not None and all(part is not other for other in found):
            found.append(part)
            rest += [part.__cause__, part.__context__]
    return found


def cast_on_host(dtype: torch.dtype) -> bool:
    """Whether the bridge casts this dtype in a pageable temporary before it copies, so that pinning is of no use.

    The device has no 64-bit types in lazy mode (bridge `lazy_kernels.cpp`, `copy_hpu_lazy_H2D`).
    """
    return is_lazy() and dtype in (torch.int64, torch.float64)


def _hpu() -> Any:
    import habana_frameworks.torch.hpu as hpu

    return hpu
