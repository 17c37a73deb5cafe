from __future__ import annotations

import pytest
import torch

from tests.contract.models import hpu


@pytest.mark.usefixtures("hpu")
def test_default_stream() -> None:
    assert hpu().current_stream() == hpu().default_stream()
    assert hpu().default_stream().id() == 0


@pytest.mark.usefixtures("hpu")
def test_side_stream_is_current_inside_the_context_only() -> None:
    side = hpu().Stream()
    x = torch.ones(3, device="hpu")
    with hpu().stream(side):
        assert hpu().current_stream() == side
        y = x + 1
    assert hpu().current_stream() == hpu().default_stream()
    hpu().current_stream().wait_stream(side)
    assert (y + 1).tolist() == [3.0] * 3
    side.synchronize()
    assert side.query()


@pytest.mark.usefixtures("hpu")
def test_event_that_was_never_recorded_is_done() -> None:
    event = hpu().Event()
    assert event.query()
    event.synchronize()


@pytest.mark.usefixtures("hpu")
def test_elapsed_time() -> None:
    start, end = hpu().Event(enable_timing=True), hpu().Event(enable_timing=True)
    x = torch.ones(64, 64, device="hpu")
    start.record()
    for _ in range(5):
        x = x @ x
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) > 0


@pytest.mark.usefixtures("emulated")
def test_nothing_starts_before_a_flush_and_causes_are_counted() -> None:
    import habana_frameworks.torch.core as htcore

    from lightning_hpu_infer.emulator import reset_stats, stats

    x = torch.ones(3).to("hpu")
    reset_stats()
    y = x + 1
    hpu().current_stream().query()
    assert stats().programs == 0
    htcore.mark_step()
    z = y * 2
    hpu().Event().record()
    z = z + 1
    assert z.sum().item() == 15.0
    w = z + 1
    with hpu().stream(hpu().Stream()):
        pass
    v = w + 1
    hpu().synchronize()
    assert v.cpu().tolist() == [7.0] * 3
    assert stats().flushes == {"mark_step": 1, "event_record": 1, "item": 1, "stream_switch": 1, "synchronize": 1}
    assert stats().mark_steps == 1


@pytest.mark.usefixtures("emulated")
def test_event_is_pending_until_its_work_is_done() -> None:
    from lightning_hpu_infer.emulator import paused

    event = hpu().Event()
    x = torch.ones(3, device="hpu") + 1
    with paused("compute"):
        event.record()
        assert not event.query()
        assert not hpu().current_stream().query()
    event.synchronize()
    assert event.query()
    assert x.tolist() == [2.0] * 3


@pytest.mark.usefixtures("emulated")
def test_wait_event_orders_streams() -> None:
    from lightning_hpu_infer.emulator import paused

    side, event, done = hpu().Stream(), hpu().Event(), hpu().Event()
    work = torch.ones(3, device="hpu") + 1
    with paused("compute"):
        event.record()
        side.wait_event(event)
        with hpu().stream(side):
            other = torch.zeros(3, device="hpu") + 1
            done.record()
        assert not done.query()
    done.synchronize()
    assert work.tolist() == [2.0] * 3
    assert other.tolist() == [1.0] * 3


@pytest.mark.usefixtures("lazy_hpu")
def test_step_closures_and_iter_mark_step() -> None:
    import habana_frameworks.torch.core as htcore

    seen: list[int] = []
    htcore.add_step_closure(seen.append, (1,))
    assert seen == []
    htcore.mark_step()
    assert seen == [1]
    assert list(htcore.iter_mark_step([1, 2])) == [1, 2]


@pytest.mark.usefixtures("eager_hpu")
def test_step_markers_do_nothing_in_eager_mode() -> None:
    import habana_frameworks.torch.core as htcore

    assert not htcore.is_lazy()
    htcore.mark_step()
    assert (torch.ones(1, device="hpu") + 1).item() == 2.0
