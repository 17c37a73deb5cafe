"""A pipeline in a thread of its own, which takes batches from any thread."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lightning_hpu_infer.pipeline import InferencePipeline

_Item = tuple[Any, "Future[Any]"]


class Lane:
    """Runs all that touches the device in one thread, as the bridge requires, and keeps it busy from many.

    Args:
        make: Makes the pipeline. Called in the lane's thread.
        name: Of the thread.

    Raises:
        Exception: What `make` raises.
    """

    def __init__(self, make: Callable[[], InferencePipeline], name: str) -> None:
        self._items: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        made: Future[None] = Future()
        # A daemon: a worker that is told to exit need not close its lane.
        self._thread = threading.Thread(target=self._run, args=(make, made), name=name, daemon=True)
        self._thread.start()
        made.result()

    def submit(self, batch: Any) -> "Future[Any]":
        """The output of a batch, in time, with host tensors; its error is raised by `result`."""
        future: Future[Any] = Future()
        self._items.put((batch, future))
        return future

    def close(self) -> None:
        """End the thread after what was submitted. A second time does nothing."""
        self._items.put(None)
        self._thread.join()

    def _run(self, make: Callable[[], InferencePipeline], made: "Future[None]") -> None:
        try:
            pipeline = make()
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(None)
        with pipeline:
            launched: deque[Future[Any]] = deque()
            depth = pipeline.config.in_flight_depth(pipeline.device.type)
            while (item := self._next(pipeline, launched)) is not None:
                batch, future = item
                try:
                    pipeline.push(batch)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    launched.append(future)
                while len(launched) > depth:
                    _resolve(pipeline, launched)
            while launched:
                _resolve(pipeline, launched)

    def _next(self, pipeline: InferencePipeline, launched: "deque[Future[Any]]") -> _Item | None:
        """The next batch. While there is none, what is in flight is waited for."""
        while launched:
            try:
                return self._items.get_nowait()
            except queue.Empty:
                _resolve(pipeline, launched)
        return self._items.get()


def _resolve(pipeline: InferencePipeline, launched: "deque[Future[Any]]") -> None:
    future = launched.popleft()
    try:
        future.set_result(pipeline.pop())
    except BaseException as error:
        future.set_exception(error)
