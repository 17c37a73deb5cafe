"""What the plugin assumes of copies, step markers and events."""

import threading
import time
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.verify.ask import (
    DEVICE,
    expect,
    expect_equal,
    host,
    launch_work,
    patiently,
    seconds_of_work,
)
from lightning_hpu_infer.verify.assumptions import NOTHING, assume

_ROWS = 1 << 20


@assume(
    "A pinned tensor may be dropped right after a non-blocking copy to the device, which keeps it until it is read.",
    source="bridge 1.19 `tensor_utils.cpp`",
    turns_off="`async_copy=False`",
)
def pinned_sources_are_kept_until_they_are_read() -> str:
    """Many copies behind work, their sources dropped and new ones made in their place."""
    work = launch_work()
    _habana.mark_step()
    copies = [_dropped_source(seed) for seed in range(8)]
    # Would take the place of what was freed.
    others = [torch.full((_ROWS,), -1.0).pin_memory(_habana.DEVICE_TYPE) for _ in range(8)]
    for seed, copy in enumerate(copies):
        expect_equal(copy, host(_ROWS, seed=seed), f"copy {seed}")
    del work, others
    return f"{len(copies)} copies of {4 * _ROWS} bytes arrived"


def _dropped_source(seed: int) -> Tensor:
    return host(_ROWS, seed=seed).pin_memory(_habana.DEVICE_TYPE).to(DEVICE, non_blocking=True)


@assume(
    "An int64 batch arrives with its values, or the copy raises where they do not fit the device's 32 bits.",
    source="bridge 1.19 `lazy_kernels.cpp`, `copy_hpu_lazy_H2D`",
    turns_off="`torch.int32` in your dataset",
)
def integers_arrive_or_raise() -> str:
    """Values at the ends of 32 bits, and beyond."""
    inside, beyond = torch.tensor([1, -(2**31), 2**31 - 1]), torch.tensor([2**31 + 5])
    expect_equal(inside.to(DEVICE), inside, "values of 32 bits")
    try:
        found = beyond.to(DEVICE).cpu()
    except RuntimeError:
        return "values of 32 bits arrive, larger ones raise"
    expect_equal(found, beyond, "a value of 33 bits")
    return "values of 64 bits arrive"


@assume(
    "A step marker launches what was called, without anybody waiting for it.",
    source="bridge 1.19 `core/step_closure.py`",
    turns_off=NOTHING,
    modes=("lazy",),
)
def step_markers_launch() -> str:
    """How long results are waited for that had time to be computed, with and without a step marker."""
    pause = 3 * seconds_of_work()

    def attempt() -> str:
        waits: dict[bool, list[float]] = {True: [], False: []}
        for marked in (True, False) * 3:
            result = launch_work()
            if marked:
                _habana.mark_step()
            time.sleep(pause)
            start = time.perf_counter()
            result[-1, -1].item()
            waits[marked].append(time.perf_counter() - start)
        launched, pending = median(waits[True]), median(waits[False])
        expect(launched < pending / 3, f"{launched:.4f} s of waiting with a step marker, {pending:.4f} s without one")
        return f"{launched:.4f} s of waiting with a step marker, {pending:.4f} s without one"

    return patiently(attempt)


@assume(
    "A copy to the host waits for its own producer, not for later work: a batch's output is read while the next runs.",
    source="bridge 1.19 `device.cpp`",
    turns_off=NOTHING,
)
def reading_waits_for_its_producer_only() -> str:
    """An old result, read while work runs that was launched later."""

    def attempt() -> str:
        early = host(16).to(DEVICE) + 1
        _habana.mark_step()
        _habana.synchronize()
        later = launch_work()
        _habana.mark_step()
        event = _habana.record_event()
        early.cpu()
        running = not event.query()
        event.synchronize()
        del later
        expect(running, "later work was done when an earlier result had been read")
        return "later work was running when an earlier result had been read"

    return patiently(attempt)


@assume(
    "An event on the default stream is done when all work and copies before it are.",
    source="bridge 1.19 `device.cpp`: stream 0 is four queues, an event covers each",
    turns_off="`pipelining=False, async_output=False`",
)
def events_cover_work_and_copies() -> str:
    """Pinned destinations of copies behind work, when the event is done."""
    for number in range(4):
        work = launch_work().flatten()
        destination = torch.full(work.shape, -1.0).pin_memory(_habana.DEVICE_TYPE)
        _habana.mark_step()
        destination.copy_(work, non_blocking=True)
        _habana.record_event().synchronize()
        found = destination.clone()
        expected = work.numel() ** -0.5
        wrong = int((~torch.isclose(found, torch.tensor(expected), rtol=1e-2, atol=0.0)).sum())
        expect(wrong == 0, f"round {number}: {wrong} of {found.numel()} elements had not arrived when it was done")
    return "results were computed and copied when the event was done"


@assume(
    "Waiting for an event lets other Python threads run.",
    source="bridge 1.19 `csrc/Event.cpp`: `synchronize` releases the GIL",
    turns_off=NOTHING,
)
def waiting_lets_threads_run() -> str:
    """The longest pause of a thread while the main one waits."""

    def attempt() -> str:
        work = [launch_work() for _ in range(3)]
        _habana.mark_step()
        event = _habana.record_event()
        ticks, stop = [time.perf_counter()], threading.Event()

        def tick() -> None:
            while not stop.wait(0.001):
                ticks.append(time.perf_counter())

        thread = threading.Thread(target=tick, name="verify-tick")
        thread.start()
        start = time.perf_counter()
        event.synchronize()
        end = time.perf_counter()
        stop.set()
        thread.join()
        del work
        seen = [start, *(at for at in ticks if start < at < end), end]
        longest, waited = max(b - a for a, b in pairwise(seen)), end - start
        expect(longest < 0.7 * waited, f"another thread stood still for {longest:.3f} s of a wait of {waited:.3f} s")
        return f"another thread stood still for {longest:.3f} s at most, in a wait of {waited:.3f} s"

    return patiently(attempt)


def _snapshot(output: Tensor) -> Tensor:
    """What `transfer.py` copies."""
    return (output.flatten() if _habana.is_lazy() else output).clone()


def _copied(output: Tensor) -> Tensor:
    """What arrives in pinned memory by the time that an event behind a non-blocking copy is done."""
    destination = torch.full(output.shape, -1.0).pin_memory(_habana.DEVICE_TYPE)
    _habana.mark_step()
    destination.copy_(output, non_blocking=True)
    _habana.record_event().synchronize()
    return destination.clone()


@assume(
    "A non-blocking copy of a dense output to pinned memory is complete when an event behind it is done.",
    source="bridge 1.19 `device.cpp`",
    turns_off="no `async_output`",
)
@torch.inference_mode()
def asynchronous_outputs_arrive() -> str:
    """Outputs of linear layers, against blocking copies of them."""
    layer = nn.Linear(256, 256).to(DEVICE)
    for number in range(8):
        snapshot = _snapshot(layer(host(1024, 256, seed=number).to(DEVICE)))
        expect_equal(_copied(snapshot), snapshot.cpu(), f"output {number}")
    return "8 outputs arrived as blocking copies have them"


@assume(
    "A flat clone of an output that the device keeps permuted, as a convolution's, arrives in order without waiting.",
    source="bridge 1.19 `permute_tensors.cpp`, `hpu_habana_launch_op_pt.cpp`: rank 2 and more may be permuted",
    turns_off="no `async_output` for networks with convolutions",
)
@torch.inference_mode()
def permuted_outputs_arrive_flat() -> str:
    """Outputs of a convolution, and what becomes of one that is not flat."""
    layer = nn.Conv2d(3, 8, 3).to(DEVICE)
    for number in range(4):
        output = layer(host(2, 3, 16, 16, seed=number).to(DEVICE))
        expected = layer(host(2, 3, 16, 16, seed=number).to(DEVICE)).cpu()
        expect_equal(_copied(_snapshot(output)).view(expected.shape), expected, f"output {number}")
    try:
        alike = torch.equal(_copied(output), expected)
    except RuntimeError:
        return "flat clones arrive; an output as it is raises"
    return f"flat clones arrive; an output as it is arrives {'too' if alike else 'in another order'}"
