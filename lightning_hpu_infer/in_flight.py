"""The queue of batches that were launched on the device and whose outputs were not fetched yet."""

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

from lightning_hpu_infer.transfer import PendingOutput

T = TypeVar("T")


def raise_after(complete: Callable[[], None], error: BaseException) -> NoReturn:
    """Complete earlier batches, and raise a later one's error; if that fails as well, its error is the context."""
    try:
        complete()
    except BaseException:
        raise error  # noqa: B904 (the other one is its context)
    raise error


class InFlight(Generic[T]):
    """The batches that were launched and not yet retired, oldest first. For one thread, the one that calls the device.

    Launching batch k+1 before the output of batch k is fetched keeps the device busy, since fetching waits for
    batch k only (bridge `device.cpp`: a copy to the host waits for the producer of its own source).

    Args:
        launch: Enqueues the work of one item and returns its output without waiting for the device.
        depth: Items that may stay in flight behind the newest.
    """

    def __init__(self, launch: Callable[[T], PendingOutput], depth: int) -> None:
        self._launch = launch
        self.depth = depth
        self._pending: deque[tuple[T, PendingOutput]] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def over_capacity(self) -> bool:
        """Whether the oldest item has to be retired before another may be launched."""
        return len(self._pending) > self.depth

    def launch(self, item: T) -> None:
        """Enqueue an item. Does not wait."""
        self._pending.append((item, self._launch(item)))

    @property
    def oldest(self) -> T:
        """The item that is retired next.

        Raises:
            IndexError: If nothing is in flight.
        """
        return self._pending[0][0]

    def retire(self) -> tuple[T, Any]:
        """Wait for the oldest item; returns it with its output. This is the only wait.

        Raises:
            IndexError: If nothing is in flight.
        """
        item, output = self._pending.popleft()
        return item, output.result()

    def clear(self) -> None:
        """Forget what is in flight."""
        while self._pending:
            self._pending.popleft()[1].drop()
