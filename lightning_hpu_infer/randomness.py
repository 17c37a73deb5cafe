"""The random state of the host, which threads share: what restores it must not run beside what draws from it."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PATIENCE_SECONDS = 10.0
_drawing = threading.RLock()
_restored = 0
"""How often something restored the state."""


@contextmanager
def kept_by_others() -> Iterator[None]:
    """Surround work that restores the random state that it found, as TorchDynamo does with each frame it traces.

    Numbers that other threads drew meanwhile would be drawn a second time (torch 2.13 `_dynamo/convert_frame.py`). So
    it waits until they have drawn, for 10 seconds at most: they may be waiting for this thread themselves.
    """
    global _restored
    acquired = _drawing.acquire(timeout=_PATIENCE_SECONDS)
    _restored += 1
    try:
        yield
    finally:
        if acquired:
            _drawing.release()


class Drawing:
    """Work beside the main thread that may draw random numbers, such as a dataset's. For one thread."""

    def __init__(self) -> None:
        self._seen = _restored
        self._left: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Surround a piece of that work. Waits while something restores the state."""
        with _drawing:
            if self._seen != _restored and self._left is not None:
                # Around the callback of a trace, in C, Python's own generator is restored as well (torch 2.13
                # `eval_frame_cpp.cpp`), to before what was drawn while the trace waited for it.
                random.setstate(self._left)
            self._seen = _restored
            try:
                yield
            finally:
                self._left = random.getstate()
