import asyncio
import contextvars
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hpu_infer.prefetch import Prefetcher, _add_note


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


# What belongs to one thread

TABLE = sqlite3.connect(":memory:")
LOCAL = threading.local()
LOCAL.client = "the main thread's"

BELONGS_TO_A_THREAD: dict[str, Callable[[], Any]] = {
    "sqlite3": lambda: TABLE.execute("select 1"),
    "signal": lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL),
    "asyncio": asyncio.get_event_loop,
    "local": lambda: LOCAL.client,
}


@pytest.mark.parametrize("source", BELONGS_TO_A_THREAD)
def test_an_error_of_what_belongs_to_a_thread_says_what_to_do(source: str) -> None:
    use = BELONGS_TO_A_THREAD[source]
    with Prefetcher(iter(use, None), 1, nullcontext) as ahead, pytest.raises(Exception) as raised:  # noqa: PT011
        next(ahead)
    kind = {"sqlite3": sqlite3.ProgrammingError, "signal": ValueError, "asyncio": RuntimeError, "local": AttributeError}
    assert type(raised.value) is kind[source]
    assert len(raised.value.args) == 1
    said = "".join(traceback.format_exception(raised.value)) if hasattr(raised.value, "add_note") else ""
    if said:
        assert "may be used in the thread only" in said
        assert "`prefetch=0`" in said
        assert "num_workers" in said


@pytest.mark.parametrize("depth", [0, 1])
def test_any_other_error_says_that_it_comes_out_of_a_thread(depth: int) -> None:
    with (
        Prefetcher((1 // item for item in (0,)), depth, nullcontext) as ahead,
        pytest.raises(ZeroDivisionError) as raised,
    ):
        next(ahead)
    notes = getattr(raised.value, "__notes__", [])
    assert [note.startswith("Raised while a batch was prepared ahead, in a thread.") for note in notes] == [
        True
    ] * depth


def test_where_errors_take_no_notes_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    class Old(ValueError):  # as on Python 3.10
        def __getattribute__(self, name: str) -> Any:
            if name == "add_note":
                raise AttributeError(name)
            return super().__getattribute__(name)

    with caplog.at_level(logging.ERROR, "lightning_hpu_infer"):
        _add_note(Old("signal only works in main thread"))
    assert "Old: Raised while" in caplog.text
    assert "`prefetch=0`" in caplog.text


def test_behind_an_item_that_hands_over_the_consumer_pulls() -> None:
    threads = (threading.current_thread().name for _ in range(4))
    numbered = enumerate(threads)
    with Prefetcher(numbered, 3, nullcontext, lambda item: item[0] == 1) as ahead:
        assert list(ahead) == [
            (0, "hpu-infer-prefetch"),
            (1, "hpu-infer-prefetch"),
            (2, "MainThread"),
            (3, "MainThread"),
        ]
        assert ahead.depth == 0
        ahead.set_depth(5)  # as the tuner may
        assert list(ahead) == []


# Ctrl-C

HANGS = """
import threading
from contextlib import nullcontext
from lightning_hpu_infer.prefetch import Prefetcher

taken = threading.Event()

def source():
    yield 1
    taken.wait()
    print("hangs", flush=True)
    threading.Event().wait()

try:
    with Prefetcher(source(), 2, nullcontext) as ahead:
        for item in ahead:
            taken.set()
except KeyboardInterrupt as error:
    print(f"ended by {error!r} in the context of {error.__context__}", flush=True)
"""


def test_ctrl_c_is_heard_while_the_dataset_hangs_and_a_second_one_ends_the_wait() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
        # A shell's background jobs ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        lines = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.strip())
                if lines[-1] == "hangs" or "Ctrl-C again" in line:
                    process.send_signal(signal.SIGINT)
        finally:
            watchdog.cancel()
            watchdog.join()
            process.kill()
    heard = "Interrupted: waiting for the dataset to return its batch. Press Ctrl-C again to end without it."
    assert lines == ["hangs", heard, "ended by KeyboardInterrupt() in the context of None"]
    assert process.returncode == 0
