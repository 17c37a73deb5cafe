"""Copies between host and device, with the bridge's rules for when a source is read and a destination is filled."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch._ops import OpOverload

from lightning_hpu_infer.emulator import pinned
from lightning_hpu_infer.emulator.engine import sleep_until
from lightning_hpu_infer.emulator.runtime import Runtime
from lightning_hpu_infer.emulator.storage import Spec, poison
from lightning_hpu_infer.emulator.task import Task
from lightning_hpu_infer.emulator.tensor import HANDLERS, HpuTensor, allocate, dispatch, run

aten = torch.ops.aten
LATE_READ_BYTES = 1 << 20
"""PT_HPU_H2D_COPY_MIN_TENSOR_SIZE: from here on lazy mode reads a pageable source after the call has returned
(bridge: device.cpp:1282-1297, env_flags.yaml:477-485)."""
_PERMUTED = (
    "handlePermutedTensor we only support non_blocking = false: an output of rank 2 or more may be kept permuted; copy"
    " it with non_blocking=False, or as a tensor of rank 1"
)
"""bridge: habana_lazy/permute_tensors.cpp:137-142. It is raised when the bytes are under way already."""
_NARROW = {torch.int64: torch.int32, torch.float64: torch.float32}


def host_to_device(rt: Runtime, dst: HpuTensor, src: torch.Tensor, *, non_blocking: bool) -> None:
    """Copy `src` into `dst` on the H2D queue; never part of the lazy graph, so a capture sees a constant."""
    rt.note_host_work()
    storage, spec = dst._cell.storage, dst._spec
    if rt.is_pending(storage):
        rt.flush("h2d")
        storage = dst._cell.storage
    src = src.detach()
    nbytes = spec.numel * spec.dtype.itemsize
    is_pinned = pinned.is_pinned(src)
    temporary = False
    if rt.config.lazy and src.dtype in _NARROW:
        src, temporary = _narrow(src), True
    elif src.dtype is not spec.dtype or src.shape != spec.size or not _is_dense(src):
        src, temporary = src.to(spec.dtype).expand(spec.size).contiguous(), True
    is_pinned = is_pinned and not temporary
    late = is_pinned or (rt.config.lazy and nbytes >= LATE_READ_BYTES)
    if spec is storage.spec:
        storage.permuted = False
    if non_blocking and not late and not temporary:
        src = src.clone()
    whole = spec is storage.spec

    def work() -> None:
        start = time.perf_counter()
        if whole:
            # A reader may still use the old memory: write in place, as DMA does.
            storage.error = None
            if storage.value is None:
                storage.value = spec.empty()
            storage.value.copy_(src)
        else:
            spec.view(storage.read()).copy_(src)
        if rt.config.h2d_gbps:
            sleep_until(start + nbytes / rt.config.h2d_gbps * 1e-9)

    task = rt.engine("h2d").submit(Task(work, kind="copy", nbytes=nbytes), (), [storage])
    rt.counters.add("h2d_copies")
    rt.counters.add("h2d_bytes", nbytes)
    rt.counters.add("h2d_pinned", is_pinned)
    rt.counters.add("h2d_non_blocking", non_blocking)
    if not non_blocking:
        rt.wait(task)


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _narrow(src: torch.Tensor) -> torch.Tensor:
    """Cast to the 32-bit type of the device, into a temporary (bridge: lazy_kernels.cpp:227-344)."""
    narrow = _NARROW[src.dtype]
    if narrow is torch.int32 and src.numel():
        low, high = (int(value) for value in torch.aminmax(src))
        info = torch.iinfo(torch.int32)
        if low < info.min or high > info.max:
            raise RuntimeError(
                f"Error when trying to cast Long to Int, Input values range [{low}, {high}] exceeds Int range"
                f" [{info.min}, {info.max}]"
            )
    return src.to(narrow)


def device_to_host(rt: Runtime, dst: torch.Tensor, src: HpuTensor, *, non_blocking: bool, cause: str) -> None:
    """Copy `src` into `dst`; waits for the producer of `src` only, not for what was queued behind it."""
    rt.note_host_work()
    spec = src._spec
    if spec.dtype in _NARROW or dst.dtype is not spec.dtype:
        non_blocking = False  # bridge: basic_kernels.cpp:245-261
    # In lazy mode such a copy is a job of the launch thread (bridge: lazy_kernels.cpp:833-873).
    queued = non_blocking and rt.has_queued_launch and pinned.is_pinned(dst)
    # Everything pending is launched, not only what `src` depends on (bridge: lazy_kernels.cpp:694-708).
    if rt.is_pending(src._cell.storage):
        rt.flush(cause, join=not queued)
    elif not queued:
        rt.join_launches()
    storage = src._cell.storage
    nbytes = spec.numel * spec.dtype.itemsize
    # A view of rank 2 is written out by a program, whose output may be permuted as well.
    permuted = rt.config.lazy and len(spec.size) > 1 and (storage.permuted or spec is not storage.spec)
    engine = rt.engine("d2h")
    rt.counters.add("d2h_copies")
    rt.counters.add("d2h_bytes", nbytes)
    rt.counters.add("d2h_non_blocking", non_blocking)

    def read(target: torch.Tensor) -> None:
        start = time.perf_counter()
        value = spec.view(storage.read())
        if permuted and non_blocking:  # as the bytes lie; a blocking copy puts them in order
            value = value.permute(*reversed(range(value.dim()))).reshape(spec.size)
        target.copy_(value)
        if rt.config.d2h_gbps:
            sleep_until(start + nbytes / rt.config.d2h_gbps * 1e-9)

    target = dst.detach()
    if not non_blocking:
        rt.wait(engine.submit(Task(lambda: read(target), kind="copy", nbytes=nbytes), [storage]))
        return
    poison(target, loud=True)
    error = RuntimeError(_PERMUTED) if permuted else None
    if queued:
        rt.queue_launch(error)
    if pinned.is_pinned(dst):

        def write() -> None:
            try:
                read(target)
            except BaseException as error:
                rt.uncopied = error
                raise

        engine.submit(Task(write, kind="copy", nbytes=nbytes), [storage])
        if error is not None and not queued:
            raise error
        return
    # A pageable destination is filled by a host thread some time after the device is done, so that even a
    # synchronized event does not mean that it can be read (bridge: device.cpp:1432-1504, stream.cpp:76-108).
    staging = torch.empty_like(target)
    transfer = engine.submit(Task(lambda: read(staging), kind="copy", nbytes=nbytes), [storage])

    def unstage() -> None:
        transfer.wait()
        if transfer.error is None:
            target.copy_(staging)

    rt.d2h_host.submit(Task(unstage))
    if error is not None:
        raise error


def _copy_(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    dst, src = args[0], args[1]
    non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if not isinstance(src, HpuTensor):
        host_to_device(rt, dst, src, non_blocking=non_blocking)
    elif isinstance(dst, HpuTensor):
        run(rt, func, (dst, src), {})
    else:
        device_to_host(rt, dst, src, non_blocking=non_blocking, cause="d2h")
    return dst  # type: ignore[no-any-return]


def _to_copy(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    src: HpuTensor = args[0]
    device = kwargs.get("device")
    options = {name: kwargs[name] for name in ("dtype", "memory_format") if kwargs.get(name) is not None}
    if device is None or device.type == "hpu":
        return run(rt, func, (src,), options)  # type: ignore[no-any-return]
    if device.type == "meta":
        return torch.empty_strided(src.shape, src.stride(), dtype=options.get("dtype", src.dtype), device="meta")
    if device.type != "cpu":
        raise RuntimeError(f"the emulated HPU copies to the CPU only, not to {device}; go through .cpu()")
    if options.get("dtype", src.dtype) is not src.dtype:
        src = run(rt, func, (src,), {"dtype": options["dtype"]})
    twin = torch.empty_strided(src.shape, src.stride(), dtype=src.dtype, device="meta")
    layout = torch.empty_like(twin, memory_format=options.get("memory_format", torch.preserve_format))
    dst = Spec.fresh(layout).empty()
    device_to_host(rt, dst, src, non_blocking=bool(kwargs.get("non_blocking")), cause="d2h")
    return dst


def _item(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    src: HpuTensor = args[0]
    dst = src._spec.empty()
    device_to_host(rt, dst, src, non_blocking=False, cause="item")
    return dst.item()


def _is_pinned(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return False


def _empty_like(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    src: HpuTensor = args[0]
    device = kwargs.get("device")
    twin = src._spec.view(src._cell.spec.empty("meta"))
    options = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "layout")}
    spec = Spec.fresh(func(twin, *args[1:], **options))
    if device is not None and device.type != "hpu":
        return spec.empty(str(device))
    return allocate(spec)


def _native_dropout(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    src, p, train = args
    if not train or p == 0:
        return dispatch(aten.clone.default, (src,), {}), torch.ones_like(src, dtype=torch.bool)
    mask = torch.empty_like(src, dtype=torch.bool).bernoulli_(1 - p)
    return (src * mask).div(1 - p) if p < 1 else src * mask, mask


def _like(fill: str) -> Any:
    def handler(rt: Runtime, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bounds = args[1:]
        if fill == "random_" and len(bounds) == 1:
            bounds = (0, *bounds)
        return getattr(torch.empty_like(args[0], **kwargs), fill)(*bounds)

    return handler


HANDLERS[aten.copy_.default] = _copy_
HANDLERS[aten._to_copy.default] = _to_copy
HANDLERS[aten._local_scalar_dense.default] = _item
HANDLERS[aten.is_pinned.default] = _is_pinned
for _op in (aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default):
    HANDLERS[_op] = _empty_like
# Random ops that take no generator, in terms of ops that do.
HANDLERS[aten.native_dropout.default] = _native_dropout
HANDLERS[aten.rand_like.default] = _like("uniform_")
HANDLERS[aten.randn_like.default] = _like("normal_")
HANDLERS[aten.randint_like.default] = _like("random_")
HANDLERS[aten.randint_like.low_dtype] = _like("random_")
