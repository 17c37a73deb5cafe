from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_hpu_infer import emulator
from lightning_hpu_infer.emulator.task import Task
from tests.helpers import Clock, installed


def _graphed(func: Callable[..., Any]) -> Callable[..., Any]:
    from habana_frameworks.torch.hpu.graphs import wrap_in_hpu_graph_func

    wrapped: Callable[..., Any] = wrap_in_hpu_graph_func(func, disable_tensor_cache=True)
    return wrapped


def _mark_step() -> None:
    import habana_frameworks.torch.core as htcore

    htcore.mark_step()


def test_counters_of_graphs_and_copies(emulated: None) -> None:
    wrapped = _graphed(lambda x: x * 2)
    for _ in range(3):
        wrapped(torch.ones(256).pin_memory("hpu").to("hpu", non_blocking=True)).cpu()
    wrapped(torch.ones(256).to("hpu"), bypass_hpu_graphs=True)
    stats = emulator.stats()
    assert (stats.captures, stats.replays, stats.compiles) == (1, 3, 1)
    assert (stats.h2d_copies, stats.h2d_pinned, stats.h2d_non_blocking, stats.h2d_bytes) == (4, 3, 3, 4096)
    assert (stats.d2h_copies, stats.d2h_bytes) == (3, 3072)
    assert stats.bytes_in_use > 0
    assert stats.peak_bytes >= stats.bytes_in_use
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.captures = 5  # type: ignore[misc]
    emulator.reset_stats()
    assert emulator.stats().replays == 0
    assert emulator.stats().bytes_in_use == stats.bytes_in_use


def test_off_thread_calls_are_counted(emulated: None) -> None:
    x = torch.ones(1).to("hpu")
    thread = threading.Thread(target=lambda: x + 1)
    thread.start()
    thread.join()
    assert emulator.stats().off_thread_calls >= 1


def test_everything_is_freed(emulated: None) -> None:
    def work() -> None:
        net = torch.nn.Linear(8, 8).to("hpu")
        wrapped = _graphed(net.forward)
        with torch.no_grad():
            for _ in range(5):
                wrapped(torch.ones(2, 8).to("hpu")).clone().cpu()

    work()
    gc.collect()
    torch.get_device_module("hpu").synchronize()
    gc.collect()
    assert emulator.stats().bytes_in_use == 0


def test_ops_without_a_device_kernel() -> None:
    with installed(cpu_fallback_ops=frozenset({"aten::cumsum"})):
        from habana_frameworks.torch.hpu.metrics import metric_global, metric_localcontext

        x = torch.ones(3).to("hpu")
        with metric_localcontext("cpu_fallback") as inside:
            assert x.cumsum(0).tolist() == [1.0, 2.0, 3.0]
        assert emulator.stats().cpu_fallbacks == 1
        assert dict(inside.stats()) == {"TotalNumber": 1, "FallbackOps": {"aten::cumsum": 1}}
        assert metric_global("nothing") is None
        with pytest.raises(RuntimeError, match="cpu fallback is not supported during hpu graph capturing"):
            _graphed(lambda y: y.cumsum(0))(x)


def test_a_program_takes_its_time_and_the_host_does_not_wait_for_it(clock: Clock) -> None:
    with installed(program_ms=20):
        x = torch.ones(2).to("hpu")
        with emulator.paused("compute"):
            for _ in range(5):
                x = x + 1
                _mark_step()
            assert emulator.stats().programs == 0
        x.cpu()
        assert clock.slept == {"compute": pytest.approx(0.1)}
        assert emulator.stats().busy_s == pytest.approx(0.1)


def test_a_new_program_compiles_once(clock: Clock) -> None:
    with installed(compile_ms=50):
        from habana_frameworks.torch.hpu.metrics import metric_global

        x = torch.ones(2).to("hpu")
        for _ in range(3):
            (x + 1).cpu()
        assert emulator.stats().compiles == 1
        assert dict(metric_global("graph_compilation").stats())["TotalNumber"] == 1
        (torch.ones(3).to("hpu") + 1).cpu()
        assert emulator.stats().compiles == 2
        assert clock.slept == {"compute": pytest.approx(0.1)}
        assert emulator.stats().busy_s == pytest.approx(0.1)


def test_launch_time_is_the_callers(clock: Clock) -> None:
    with installed(launch_us=20_000):
        x = torch.ones(2).to("hpu") + 1
        _mark_step()
        assert clock.slept == {threading.current_thread().name: pytest.approx(0.02)}
        assert x.tolist() == [2.0, 2.0]


def test_copies_take_their_bandwidth(clock: Clock) -> None:
    with installed(h2d_gbps=0.1, d2h_gbps=0.2):
        x = torch.ones(1000).to("hpu")
        assert clock.slept == {"h2d": pytest.approx(4e-5)}
        x.cpu()
        assert clock.slept == {"h2d": pytest.approx(4e-5), "d2h": pytest.approx(2e-5)}


def test_copies_and_programs_overlap() -> None:
    with installed():
        x = torch.ones(2).to("hpu")
        source = torch.ones(1000).pin_memory("hpu")
        with emulator.paused("compute"):
            y = x + 1
            _mark_step()
            # Both copy queues get on with their work while the program waits.
            assert torch.equal(source.to("hpu", non_blocking=True).cpu(), source)
        assert torch.equal(y.cpu(), torch.full((2,), 2.0))


def test_waiting_leaves_the_interpreter_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    host, waits, wait = threading.current_thread(), threading.Event(), Task.wait

    def announced(task: Task) -> None:
        if threading.current_thread() is host:
            waits.set()
        wait(task)

    with installed():
        x = torch.ones(2).to("hpu") + 1
        monkeypatch.setattr(Task, "wait", announced)
        held = emulator.paused("compute")
        held.__enter__()

        def let_go() -> None:
            assert waits.wait(20)
            held.__exit__(None, None, None)

        other = threading.Thread(target=let_go)
        other.start()
        assert x.tolist() == [2.0, 2.0]  # Would never end if it kept the other thread from running.
        other.join()


def test_idle_time_is_the_gap_between_programs(clock: Clock) -> None:
    with installed(program_ms=20):
        x = torch.ones(2).to("hpu")
        (x + 1).cpu()
        clock.now += 0.05
        (x + 1).cpu()
        assert emulator.stats().idle_s == pytest.approx(0.05)
        assert emulator.stats().blocking_waits == 3


def test_a_program_that_only_moves_memory_does_not_take_a_networks_time(clock: Clock) -> None:
    with installed(program_ms=500):
        x = torch.ones(4).to("hpu")
        for move in (torch.clone, lambda x: x.to(torch.bfloat16), lambda x: torch.empty(4, device="hpu").copy_(x)):
            move(x).cpu()
        assert emulator.stats().programs == 3
        assert clock.slept == {}
        (x + 1).cpu()
        assert clock.slept == {"compute": pytest.approx(0.5)}


def test_a_new_pinned_block_at_the_address_of_a_dead_one_stays_pinned() -> None:
    """Its finalizer runs after the memory was freed, when another thread may have got the same address."""
    from lightning_hpu_infer.emulator import pinned

    with installed():
        blocks = [torch.ones(8).pin_memory("hpu") for _ in range(2)]
        address = blocks[0].data_ptr()
        dead, pinned._blocks[address] = pinned._blocks[address], object()
        pinned._forget(address, dead)
        assert blocks[0].is_pinned("hpu")
        del pinned._blocks[address]
