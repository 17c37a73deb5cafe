"""fp8 training; the names exist, fp8 does not."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def fp8_autocast(enabled: bool = False, **kwargs: Any) -> Iterator[None]:
    """Do nothing unless enabled."""
    if enabled:
        raise NotImplementedError("fp8 is not emulated; use precision 'bf16-mixed' or '32-true'")
    yield


class Linear:
    """Not emulated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("fp8 layers are not emulated; use precision 'bf16-mixed' or '32-true'")
