"""A host thread that prepares batches ahead of the device."""

import contextvars
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Generic, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hpu_infer.randomness import drawing

T = TypeVar("T")

_log = logging.getLogger(__name__)

_JOIN_SECONDS = 10.0
_NOTE = "Raised while a batch was prepared ahead, in a thread. With `prefetch=0` the main thread prepares batches."
_NOTE_OF_THREADS = (
    "Raised while a batch was prepared ahead, in a thread, which seems to be what is wrong with it: something that the"
    " dataset uses may be used in the thread only that made it (connections, signal handlers, event loops). Pass"
    " `prefetch=0`, with which the main thread prepares batches, or make it in each worker process of a"
    " `DataLoader(num_workers=...)`."
)


class _End:
    """What the thread puts last: the error that ended it; None at the natural end, and where it hands over."""

    def __init__(self, error: BaseException | None, *, hands_over: bool) -> None:
        self.error = error
        self.hands_over = hands_over


class Prefetcher(Generic[T]):
    """Iterates over `source` in a thread, at most `depth` items ahead, in order.

    A slot is reserved *before* an item is pulled, so that the items being prepared and those ready never add up to
    more than `depth`. An error of the source is raised in the consumer behind the items that came before it, with the
    traceback of the thread. With `depth=0` there is no thread: items are pulled when they are asked for.

    Use it as a context manager: leaving it stops the thread and drops what is ready. Where that is by Ctrl-C while the
    source is at work, a second Ctrl-C leaves the thread behind at once.

    Args:
        source: What to iterate over. With a thread, only the thread touches it.
        depth: Items ahead of the consumer.
        context: Makes the context that the thread runs in. Grad and inference mode are per thread in torch, so a
            thread that handles tensors has to enter them itself.
        hands_over: Tells an item after which the consumer pulls all others itself, when it asks for them.

    Example::

        with Prefetcher(batches, depth=2, context=torch.inference_mode) as ahead:
            for batch in ahead:
                ...
    """

    def __init__(
        self,
        source: Iterator[T],
        depth: int,
        context: Callable[[], AbstractContextManager[object]],
        hands_over: Callable[[T], bool] = lambda item: False,
    ) -> None:
        self._source = source
        self._context = context
        self._hands_over = hands_over
        self._ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
        # A queue of tokens is a semaphore that needs no Python code to pass.
        self._slots: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.depth = 0
        """Items ahead of the consumer; 0 without a thread."""
        self._surplus = 0
        """Slots to take away when their items are handed out."""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if depth:
            # The consumer's context variables hold in the thread too, as they would without one.
            run = contextvars.copy_context().run
            self._thread = threading.Thread(target=run, args=(self._produce,), name="hpu-infer-prefetch", daemon=True)
            self.set_depth(depth)

    def __enter__(self) -> "Prefetcher[T]":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.close()
            return
        # The interrupt that is raised is the first one.
        with suppress(KeyboardInterrupt):
            if self._thread is not None and self._thread.is_alive():
                rank_zero_info(
                    "Interrupted: waiting for the dataset to return its batch. Press Ctrl-C again to end without it."
                )
            self.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._thread is None:
            return next(self._source)
        if self._stopped.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, _End):
            if item.hands_over:
                self._thread.join()
                self._thread, self.depth = None, 0
                return next(self._source)
            self._stopped.set()
            if item.error is not None:
                raise item.error
            raise StopIteration
        if self._surplus:
            self._surplus -= 1
        else:
            self._slots.put(None)
        return item

    def set_depth(self, depth: int) -> None:
        """Go on with another depth, from the consumer's thread. Fewer items ahead come about as they are handed out.

        Where there is no thread, nothing changes.
        """
        if self._thread is None:
            return
        more = depth - self.depth - self._surplus
        self._surplus = max(0, -more)
        for _ in range(more):
            self._slots.put(None)
        self.depth = depth

    def close(self) -> None:
        """Stop the thread and wait for it. What it has prepared is dropped. May be called again."""
        self._stopped.set()
        self._slots.put(None)
        if self._thread is None or not self._thread.is_alive():
            return
        self._thread.join(_JOIN_SECONDS)
        if self._thread.is_alive():
            rank_zero_warn(
                f"The dataloader did not return within {_JOIN_SECONDS:g} s after prediction ended. Its thread is left"
                " behind and ends when the dataloader returns; set a `timeout` on the DataLoader to bound this."
            )

    def _produce(self) -> None:
        error: BaseException | None = None
        hands_over = False
        try:
            with self._context():
                while not hands_over and self._reserve():
                    try:
                        with drawing():
                            item = next(self._source)
                    except StopIteration:
                        break
                    hands_over = self._hands_over(item)
                    self._ready.put(item)
        except BaseException as exception:
            error = exception
            _add_note(error)
        self._ready.put(_End(error, hands_over=hands_over))

    def _reserve(self) -> bool:
        self._slots.get()
        return not self._stopped.is_set()


def _add_note(error: BaseException) -> None:
    """Say with an error that it comes out of a thread, which may be what is wrong. Its type and arguments stay."""
    text = str(error).lower()
    note = _NOTE_OF_THREADS if "thread" in text or "event loop" in text else _NOTE
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        _log.error("%s: %s", type(error).__name__, note)
