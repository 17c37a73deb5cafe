"""Lazy or eager mode."""

import functools
import os
from collections.abc import Callable
from typing import Any


@functools.cache
def is_lazy() -> bool:
    """Tell whether lazy mode is on; read once (bridge: utils/internal.py:25-31)."""
    return os.getenv("PT_HPU_LAZY_MODE", "1") != "0"


def lazy_only(func: Callable[..., Any]) -> Callable[..., Any]:
    """Turn `func` into one that does nothing in eager mode."""
    if is_lazy():
        return func

    @functools.wraps(func)
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return nothing
