"""The user's function on each output: in place, or in a pool beside the main thread, with its results in order."""

import contextvars
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hpu_infer.ahead import has_modes
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observer import Lane, Observer, Stage
from lightning_hpu_infer.workers import Mode, Processes, opened, timed

T = TypeVar("T")

_JOIN_SECONDS = 10.0


class Postprocess(Generic[T]):
    """Items whose output is on its way through a function, oldest first. Main thread only.

    A context manager: leaving it ends the pool and drops what is in it. Calls that are running then are waited for in
    threads, and cut off in processes.

    Args:
        config: Has the function, which takes an output with host tensors; None changes nothing. Also the workers: how
            many, and what they are. Without any, or without `pipelining`, it is called in place, when its result is
            taken.
        mode: The context of each call: grad and inference mode are per thread.
        observer: Observes the calls, and the waiting for them.
        threads: Whether threads beside the main thread make tensors as it does.
        on_done: Called when a call in the pool has ended, by any thread.

    Raises:
        TypeError: If the function cannot be sent to other processes.
    """

    def __init__(
        self,
        config: InferenceConfig,
        mode: Mode,
        observer: Observer | None = None,
        *,
        threads: bool = True,
        on_done: Callable[[], object] | None = None,
    ) -> None:
        self._function = config.postprocess
        self.is_on: bool = config.postprocess is not None
        """Whether there is a function."""
        self._observer = observer or Observer()
        self._told = False
        self._on_done = on_done
        self._pool: _Threads | Processes | None = None
        workers, in_threads = config.postprocess_workers, config.postprocess_backend == "thread"
        if (
            self._function is not None
            and config.pipelining
            and workers
            and _may_run_elsewhere(threads or not in_threads)
        ):
            self._pool = (_Threads if in_threads else Processes)(self._function, workers, mode)
            self._timed = partial(timed, mode, self._function)
        self.depth = 2 * workers if self._pool is not None else 0
        """Items that may be in it when another one comes: one at work and one waiting per worker."""
        self._pending: deque[tuple[T, int, Any]] = deque()

    def __enter__(self) -> "Postprocess[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def over_capacity(self) -> bool:
        """Whether the oldest item has to be taken before another may be submitted."""
        return len(self._pending) > self.depth

    @property
    def oldest(self) -> T:
        """The item that is taken next.

        Raises:
            IndexError: If nothing was submitted.
        """
        return self._pending[0][0]

    @property
    def ready(self) -> bool:
        """Whether the oldest item can be taken without waiting for the pool."""
        return bool(self._pending) and (self._pool is None or self._pending[0][2].done())

    def submit(self, item: T, output: Any, index: int) -> None:
        """Have the function called with an item's output, and do not wait for it.

        Args:
            item: What `take` returns it with. An error of its call names it.
            output: With host tensors, which nobody else uses any more.
            index: The batch's index, for the observer.
        """
        if self._pool is not None:
            output = self._submitted(self._pool, output)
            if (on_done := self._on_done) is not None:
                output.add_done_callback(lambda _: on_done())
        self._pending.append((item, index, output))

    def _submitted(self, pool: "_Threads | Processes", output: Any) -> "Future[Any]":
        """A call in the pool; where that takes nothing, one that is done."""
        try:
            return pool.submit(output)
        except RuntimeError as error:
            done: Future[Any] = Future()
            if not str(error).startswith("cannot schedule new futures"):
                done.set_exception(error)  # the items before this one have their turn first
                return done
        # The main thread has ended, and with it all pools; but items may be left, and other threads make more.
        try:
            done.set_result(self._timed(output))
        except BaseException as error:
            done.set_exception(error)
        return done

    def take(self) -> tuple[T, Any]:
        """Wait for the oldest item; returns it with what the function returned, or raises what the function raised.

        Raises:
            IndexError: If nothing was submitted.
            RuntimeError: If a worker process died, or the function raised `StopIteration`.
        """
        item, index, output = self._pending.popleft()
        self._observer.at(index)
        if self._pool is None:
            return item, self.call(item, output)
        try:
            start, end, value = self._observer.timed(Stage.WAIT_POSTPROCESS, output.result)
            self._observer.add(Stage.POSTPROCESS, Lane.POSTPROCESS, start, end, index)
            return item, opened(value)
        except Exception as error:
            where = f"`postprocess` of {item}"
            if isinstance(self._pool, Processes) and (cause := self._pool.cause(output)):
                raise RuntimeError(f"{where}, or of a batch that was in the pool with it: {cause}") from error
            self._fail(error, where)

    def call(self, item: T, output: Any) -> Any:
        """Call the function in place; returns and raises as `take` does."""
        if self._pool is not None and not self._told:
            self._told = True
            rank_zero_info("`postprocess` runs in place, since end hooks run right after each step (`defer_hooks`).")
        if self._function is None:
            return output
        try:
            return self._observer.timed(Stage.POSTPROCESS, self._function, output)
        except Exception as error:
            self._fail(error, f"`postprocess` of {item}")

    def close(self) -> None:
        """End the pool and drop what is in it. May be called again."""
        running = [output for _, _, output in self._pending if self._pool is not None and not output.cancel()]
        self._pending.clear()
        if isinstance(self._pool, Processes):
            self._pool.close(abandon=any(not future.done() for future in running))
        elif self._pool is not None:
            self._pool.close(running)

    def _fail(self, error: Exception, where: str) -> NoReturn:
        if isinstance(error, StopIteration):
            # From a hook it ends a run quietly, as in stock Lightning; here predictions would be missing.
            raise RuntimeError(f"{where} raised StopIteration.") from error
        if sys.version_info >= (3, 11):
            error.add_note(f"Raised by {where}.")
        else:
            rank_zero_info(f"{type(error).__name__} is raised by {where}.")
        raise error


def _may_run_elsewhere(threads: bool) -> bool:
    """Whether the function computes in another thread or process what it would in this one; says so if not."""
    reason = "" if threads else "the step changes torch's default dtype, which threads share"
    if has_modes():
        reason = "`torch.autocast` or `torch.set_default_device` is on, which only this thread has"
    if not threading.main_thread().is_alive():
        reason = "the main thread has ended, and Python starts no pool any more"
    if reason:
        rank_zero_info(f"`postprocess` runs in place, since {reason}.")
    return not reason


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    # A thread takes over the number when it first asks for it, and keeps it.
    torch.get_num_threads()


class _Threads:
    """Threads that run a function, each with one thread of torch.

    The main thread's context variables hold in them, as they would in place.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, mode: Mode) -> None:
        self._call = partial(timed, mode, function)
        # The number is the calling thread's, and that of all threads to come (torch `ParallelOpenMP.cpp`). Started
        # together, so that it can be set back at once for the latter.
        number, started = torch.get_num_threads(), threading.Barrier(workers + 1)
        self._pool = ThreadPoolExecutor(workers, "hpu-infer-postprocess", _use_one_thread)
        for _ in range(workers):
            self._pool.submit(started.wait)
        started.wait()
        torch.set_num_threads(number)

    def submit(self, argument: Any) -> "Future[tuple[float, float, Any]]":
        return self._pool.submit(contextvars.copy_context().run, self._call, argument)

    def close(self, running: "list[Future[Any]]") -> None:
        stuck = wait(running, _JOIN_SECONDS).not_done
        self._pool.shutdown(wait=not stuck, cancel_futures=True)
        if stuck:
            rank_zero_warn(
                f"`postprocess` did not return within {_JOIN_SECONDS:g} s after prediction ended. {len(stuck)} of its"
                " threads are left behind; Python waits for them when it exits."
            )
