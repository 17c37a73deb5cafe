"""Step markers; all of them do nothing in eager mode."""

from collections.abc import Callable, Sequence
from typing import Any

from habana_frameworks.torch import _core_C
from habana_frameworks.torch.utils.internal import lazy_only

_closures: list[Callable[[], Any]] = []


@lazy_only
def add_step_closure(closure: Callable[..., Any], args: Sequence[Any] = ()) -> None:
    """Call `closure` after the next step marker."""
    _closures.append(lambda: closure(*args))


def _run_step_closures() -> None:
    pending, _closures[:] = _closures[:], []
    for closure in pending:
        closure()


@lazy_only
def mark_step(device_str: str = "", sync: bool = False) -> None:
    """Launch what is pending. `sync` waits for the launch, which here is always done on return."""
    _core_C._mark_step(device_str, sync)
    _run_step_closures()


@lazy_only
def iter_mark_step(device_str: str = "") -> None:
    """Mark the end of an iteration, which launches nothing (bridge: hpu_lazy_tensors.cpp:1671)."""
    _core_C._iter_mark_step()
    _run_step_closures()
