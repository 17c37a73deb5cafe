import contextvars
import threading
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count

import pytest
import torch

from lightning_hpu_infer.prefetch import Prefetcher


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
def test_items_arrive_in_order(depth: int) -> None:
    with Prefetcher(iter(range(20)), depth, nullcontext) as ahead:
        assert list(ahead) == list(range(20))
        assert list(ahead) == []


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_rule_10_never_more_than_depth_items_ahead(depth: int) -> None:
    pulled = threading.Semaphore(0)
    started: list[int] = []

    def source() -> Iterator[int]:
        for item in count():
            started.append(item)
            pulled.release()
            yield item

    with Prefetcher(source(), depth, nullcontext) as ahead:
        for taken in range(10):
            # The thread gets as far as it may: `depth` items beyond those taken.
            for _ in range(depth if taken == 0 else 1):
                assert pulled.acquire(timeout=10)
            assert started == list(range(taken + depth))
            assert next(ahead) == taken


def test_depth_0_uses_no_thread() -> None:
    caller = threading.get_ident()
    threads = (threading.get_ident() for _ in range(3))
    with Prefetcher(threads, 0, nullcontext) as ahead:
        assert list(ahead) == [caller] * 3


def test_an_error_arrives_behind_the_items_before_it_with_its_traceback() -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise KeyError("row 3 is broken")

    items: list[int] = []
    with Prefetcher(source(), 2, nullcontext) as ahead, pytest.raises(KeyError, match="row 3") as raised:
        items.extend(ahead)
    assert items == [0, 1, 2]
    assert "raise KeyError" in "".join(traceback.format_tb(raised.value.__traceback__))


def test_nothing_comes_after_an_error() -> None:
    with Prefetcher((1 // item for item in (1, 0, 1)), 2, nullcontext) as ahead:
        assert next(ahead) == 1
        with pytest.raises(ZeroDivisionError):
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)


def test_leaving_early_ends_the_thread() -> None:
    with Prefetcher(count(), 3, nullcontext) as ahead:
        assert next(ahead) == 0
        thread = ahead._thread
    assert thread is not None
    assert not thread.is_alive()
    ahead.close()  # a second time does nothing


def test_leaving_waits_for_a_source_that_is_at_work() -> None:
    working, may_go_on = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        working.set()
        assert may_go_on.wait(10)
        yield 1

    with Prefetcher(source(), 1, nullcontext) as ahead:
        assert working.wait(10)
        may_go_on.set()
    assert ahead._thread is not None
    assert not ahead._thread.is_alive()


def test_a_source_that_never_returns_is_left_behind_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_hpu_infer.prefetch._JOIN_SECONDS", 0.01)
    working, may_go_on = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        working.set()
        may_go_on.wait()
        yield 1

    ahead = Prefetcher(source(), 1, nullcontext).__enter__()
    assert working.wait(10)
    with pytest.warns(UserWarning, match="did not return within"):
        ahead.close()
    may_go_on.set()
    assert ahead._thread is not None
    ahead._thread.join()


def test_rule_2_the_thread_has_its_own_inference_mode() -> None:
    modes = (torch.is_inference_mode_enabled() for _ in range(2))
    with Prefetcher(modes, 1, torch.inference_mode) as ahead:
        assert list(ahead) == [True, True]
    assert not torch.is_inference_mode_enabled()


def test_context_variables_of_the_consumer_hold_in_the_thread() -> None:
    variable = contextvars.ContextVar("variable", default=0)
    token = variable.set(5)
    try:
        with Prefetcher((variable.get() for _ in range(1)), 1, nullcontext) as ahead:
            assert list(ahead) == [5]
    finally:
        variable.reset(token)
