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
def test_step_closures() -> None:
    import habana_frameworks.torch.core as htcore

    seen: list[int] = []
    htcore.add_step_closure(seen.append, (1,))
    assert seen == []
    htcore.mark_step()
    assert seen == [1]
    htcore.add_step_closure(seen.append, args=(2,))
    htcore.iter_mark_step()
    assert seen == [1, 2]
    htcore.mark_step(sync=True)
    assert seen == [1, 2]


@pytest.mark.usefixtures("emulated")
def test_an_iterations_end_launches_nothing() -> None:
    import habana_frameworks.torch.core as htcore

    from lightning_hpu_infer.emulator import stats

    x = torch.ones(1).to("hpu") + 1
    programs = stats().programs
    htcore.iter_mark_step("")
    hpu().synchronize()
    assert stats().flushes.get("mark_step", 0) == 0
    assert stats().programs == programs + 1
    assert x.item() == 2.0


@pytest.mark.usefixtures("emulated")
def test_waiting_for_a_stream_launches_what_is_pending_only_if_another_one_is_current() -> None:
    from lightning_hpu_infer.emulator import stats

    x = torch.ones(1).to("hpu") + 1
    hpu().current_stream().synchronize()
    assert stats().programs == 0
    hpu().Stream().synchronize()
    hpu().current_stream().synchronize()
    assert stats().programs == 1
    y = x + 1
    hpu().Stream().query()
    assert stats().flushes == {"synchronize": 1, "query": 1}
    assert y.item() == 3.0


@pytest.mark.usefixtures("hpu")
def test_streams_by_number() -> None:
    side = hpu().Stream()
    assert side.id() == side.stream_id != 0
    assert hpu().Stream(stream_id=side.stream_id, device_index=0, device_type=side.device_type) == side
    assert hpu().Stream() != side
    assert hpu().get_stream_info(side) == (torch.device("hpu", 0), side.stream_id)
    with hpu().stream(side):
        assert hpu().current_stream() == side
        with hpu().stream(None), hpu().stream(hpu().default_stream()):
            assert hpu().current_stream().id() == 0
        assert hpu().current_stream() == side


@pytest.mark.usefixtures("hpu")
def test_streams_may_be_noted_for_a_tensor() -> None:
    x = torch.ones(2).to("hpu")
    hpu().record_stream(x, hpu().current_stream())
    assert x.tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("hpu")
def test_elapsed_time_needs_two_recorded_events() -> None:
    recorded = hpu().Event(enable_timing=True)
    recorded.record()
    recorded.synchronize()
    with pytest.raises(RuntimeError, match="Both events must be recorded before calculating elapsed time"):
        recorded.elapsed_time(hpu().Event(enable_timing=True))


@pytest.mark.usefixtures("eager_hpu")
def test_step_markers_do_nothing_in_eager_mode() -> None:
    import habana_frameworks.torch.core as htcore

    assert not htcore.is_lazy()
    htcore.mark_step()
    assert (torch.ones(1, device="hpu") + 1).item() == 2.0
