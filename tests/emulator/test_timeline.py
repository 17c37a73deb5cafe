from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from lightning_hpu_infer import emulator
from lightning_hpu_infer.emulator import DeviceSpan
from tests.helpers import Clock, installed


def _batches() -> None:
    from habana_frameworks.torch.hpu.graphs import wrap_in_hpu_graph_func

    wrapped = wrap_in_hpu_graph_func(lambda x: x * 2 + 1, disable_tensor_cache=True)
    for size in (8, 8, 16, 8):
        x = torch.ones(size).pin_memory("hpu").to("hpu", non_blocking=True)
        result = torch.empty(size).pin_memory("hpu")
        result.copy_(wrapped(x).clone(), non_blocking=True)
        torch.get_device_module("hpu").synchronize()
        assert torch.equal(result, torch.full((size,), 3.0))


def _of(spans: list[DeviceSpan], kind: str, queue: str | None = None) -> list[DeviceSpan]:
    return [span for span in spans if span.kind == kind and span.queue == (queue or span.queue)]


def test_counts_and_bytes_are_those_of_the_counters() -> None:
    with installed(compile_ms=2):
        emulator.start_timeline()
        _batches()
        spans = emulator.stop_timeline()
        stats = emulator.stats()
    assert stats.programs > 4
    assert stats.compiles >= 2
    assert len(_of(spans, "compute", "compute")) == stats.programs
    assert len(_of(spans, "compile", "compute")) == stats.compiles
    for queue, count, nbytes in (
        ("h2d", stats.h2d_copies, stats.h2d_bytes),
        ("d2h", stats.d2h_copies, stats.d2h_bytes),
    ):
        copies = _of(spans, "copy", queue)
        assert len(copies) == count == 4
        assert sum(span.nbytes for span in copies) == nbytes == 160
    assert len(spans) == stats.programs + stats.compiles + 8
    assert all(span.nbytes == 0 for span in spans if span.kind != "copy")


@pytest.mark.parametrize("lazy", [True, False])
def test_order(lazy: bool) -> None:
    with installed(lazy=lazy):
        emulator.start_timeline()
        (torch.ones(4).to("hpu") * 2).cpu()
        spans = emulator.stop_timeline()
    assert [(span.queue, span.kind) for span in spans] == [("h2d", "copy"), ("compute", "compute"), ("d2h", "copy")]
    assert all(span.start <= span.end for span in spans)
    # Each of them waits for the one before.
    assert all(before.end <= after.start for before, after in itertools.pairwise(spans))


def test_spans_of_a_queue_do_not_overlap() -> None:
    with installed(compile_ms=1, program_ms=2, h2d_gbps=0.1, d2h_gbps=0.1):
        emulator.start_timeline()
        _batches()
        spans = emulator.stop_timeline()
    assert spans == sorted(spans, key=lambda span: span.start)
    for queue in ("compute", "h2d", "d2h"):
        of_queue = [span for span in spans if span.queue == queue]
        assert all(before.end <= after.start for before, after in itertools.pairwise(of_queue))


def test_a_compile_is_a_span_of_its_own_before_its_program(clock: Clock) -> None:
    with installed(compile_ms=30, program_ms=20):
        x = torch.ones(2).to("hpu")
        emulator.start_timeline()
        for _ in range(2):
            (x + 1).cpu()
        compile_, first, _, second, _ = emulator.stop_timeline()
    assert [span.kind for span in (compile_, first, second)] == ["compile", "compute", "compute"]
    assert compile_.end - compile_.start == pytest.approx(0.03)
    assert compile_.end <= first.start
    assert [span.end - span.start for span in (first, second)] == pytest.approx([0.02, 0.02])


def test_a_program_that_only_moves_memory_is_work_too(emulated: None) -> None:
    x = torch.ones(2).to("hpu")
    emulator.start_timeline()
    x.clone().cpu()
    assert [span.kind for span in emulator.stop_timeline()] == ["compute", "copy"]


def test_a_copy_takes_its_bandwidth(clock: Clock) -> None:
    with installed(h2d_gbps=0.1):
        emulator.start_timeline()
        torch.ones(1000).to("hpu")
        (copy,) = emulator.stop_timeline()
    assert copy.end - copy.start == pytest.approx(4e-5)


def test_a_queue_that_waits_does_not_work(emulated: None) -> None:
    source = torch.ones(2).pin_memory("hpu")
    emulator.start_timeline()
    with emulator.paused("h2d"):
        y = source.to("hpu", non_blocking=True) + 1
        import habana_frameworks.torch.core as htcore

        htcore.mark_step()
    y.cpu()
    h2d, compute, _ = emulator.stop_timeline()
    assert (h2d.queue, compute.queue) == ("h2d", "compute")
    assert h2d.end <= compute.start


def test_a_failed_program_is_recorded(emulated: None) -> None:
    x = torch.tensor([5]).to("hpu")
    weight = torch.ones(2, 2).to("hpu")
    emulator.start_timeline()
    with pytest.raises(IndexError):
        torch.nn.functional.embedding(x, weight).cpu()
    # The copy that found the error did its waiting, though nothing came of it.
    assert [span.kind for span in emulator.stop_timeline()] == ["compute", "copy"]
    assert emulator.stats().programs == 1


def test_streams_have_queues_of_their_own(emulated: None) -> None:
    hpu: Any = torch.get_device_module("hpu")
    emulator.start_timeline()
    stream = hpu.Stream()
    with hpu.stream(stream):
        (torch.ones(2).to("hpu") + 1).cpu()
    assert {span.queue for span in emulator.stop_timeline()} == {f"stream-{stream.stream_id}"}


def test_nothing_is_recorded_when_stopped(emulated: None) -> None:
    assert emulator.stop_timeline() == []
    (torch.ones(2).to("hpu") + 1).cpu()
    emulator.start_timeline()
    assert emulator.stop_timeline() == []
    (torch.ones(2).to("hpu") + 1).cpu()
    assert emulator.stop_timeline() == []
    emulator.start_timeline()
    (torch.ones(2).to("hpu") + 1).cpu()
    emulator.start_timeline()
    assert emulator.stop_timeline() == []


def test_the_bridges_names(emulated: None) -> None:
    from habana_frameworks.torch import emulator_timeline

    emulator_timeline.start()
    torch.ones(2).to("hpu")
    (span,) = emulator_timeline.stop()
    assert dataclasses.asdict(span).keys() == {"queue", "kind", "queued_at", "start", "end", "nbytes"}
    assert (span.queue, span.kind, span.nbytes) == ("h2d", "copy", 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        span.queue = "d2h"
    assert emulator_timeline.stop() == []


def test_without_the_emulator() -> None:
    for func in (emulator.start_timeline, emulator.stop_timeline):
        with pytest.raises(RuntimeError, match="not installed"):
            func()
