"""Step markers; all of them do nothing in eager mode."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from habana_frameworks.torch import _core_C
from habana_frameworks.torch.utils.internal import lazy_only

_closures: list[Callable[[], Any]] = []


@lazy_only
def add_step_closure(closure: Callable[..., Any], args: Sequence[Any] = (), run_async: bool = False) -> None:
    """Call `closure` after the next step marker."""
    _closures.append(lambda: closure(*args))


@lazy_only
def mark_step(device_str: str = "", sync: bool = False) -> None:
    """Launch what is pending. `sync` waits for the launch, which here is always done on return."""
    _core_C.step_marker()
    pending, _closures[:] = _closures[:], []
    for closure in pending:
        closure()


@lazy_only
def iter_mark_step(iterable: Iterable[Any]) -> Iterator[Any]:
    """Iterate with a step marker after each item."""
    for item in iterable:
        yield item
        mark_step()
