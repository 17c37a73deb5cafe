"""The random state of the host, which threads share: what restores it must not run beside what draws from it."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PATIENCE_SECONDS = 10.0
_drawing = threading.RLock()
_undone: Any = None
"""The state of Python's generator that a trace goes back from, if anything was drawn while the trace waited."""


@contextmanager
def kept_by_others() -> Iterator[None]:
    """Surround work that restores the random state that it found.

    Numbers that other threads drew meanwhile would be drawn a second time. So it waits until they have drawn, for 10
    seconds at most: they may be waiting for this thread themselves.
    """
    acquired = _drawing.acquire(timeout=_PATIENCE_SECONDS)
    try:
        yield
    finally:
        if acquired:
            _drawing.release()


@contextmanager
def tracing() -> Iterator[None]:
    """Surround what TorchDynamo's callback does with a frame, which restores the state (torch 2.13 `convert_frame.py`).

    Around the callback, in C, Python's generator is restored as well (torch 2.13 `eval_frame_cpp.cpp`), to before what
    was drawn while this waits. The next `drawing` goes on from there.
    """
    global _undone
    before = random.getstate()
    with kept_by_others():
        if (now := random.getstate()) != before:
            _undone = now
        yield


@contextmanager
def drawing() -> Iterator[None]:
    """Surround work beside the main thread that may draw random numbers, such as a dataset's. For one thread.

    Waits while something restores the state.
    """
    global _undone
    with _drawing:
        if _undone is not None:
            random.setstate(_undone)
            _undone = None
        yield
