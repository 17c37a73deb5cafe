"""What the graphs of a run share: options, counters, warnings, and the one capture at a time."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.graphs.counts import GraphCounts
from lightning_hpu_infer.graphs.replacements import DataReplacements
from lightning_hpu_infer.observe.spans import Observer

T = TypeVar("T")


class GraphContext:
    """What the graphs of a model share. Used by the main thread only.

    Args:
        root: The model.
        config: Its options for graphs are used.
        device: Where the model is in a run.
        kind: "hpu_graph", "direct", or the backend that compiles FX graphs.
    """

    def __init__(self, root: nn.Module, config: InferenceConfig, device: torch.device, kind: str) -> None:
        # Dynamo keeps graphs in C++, and graphs keep this: the model must not depend on that.
        self._root = weakref.ref(root)
        self.config = config
        self.device = device
        self.kind = kind
        self.counts = GraphCounts()
        self.replacements = DataReplacements()
        self.name = "`predict_step`"
        """What messages call the function that runs."""
        self.step = 0
        """Counts the calls of steps and networks."""
        self.capturing = False
        """Whether a capture is going on: a graph inside of another is refused by the bridge."""
        self.gives_up = ""
        """Why the function that runs should not be traced any longer; empty while it may."""
        self.timed: Callable[..., Any] = Observer().timed
        self._warned: set[str] = set()
        self._to_tell: list[str] = []
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def begin(self, observer: Observer) -> None:
        """Begin a run: counters at zero, warnings anew."""
        self.counts = GraphCounts()
        self.timed = observer.timed
        self._warned.clear()

    def register(self, graph: Any) -> None:
        """Know a graph, to release it in time."""
        self._graphs.add(graph)

    def graphs(self) -> list[Any]:
        """Those that are in use."""
        return list(self._graphs)

    def registered(self) -> set[int]:
        """The parameters and buffers of the model, each by `id`."""
        root = self._root()
        assert root is not None  # its step is running
        return {id(tensor) for tensor in (*root.parameters(), *root.buffers())}

    def release(self) -> None:
        """Free what all graphs hold, without waiting for the garbage collector. Not during a run.

        May be called by the collector, in any thread, even where the device is gone: it asks nothing of the device.
        """
        for graph in self.graphs():
            graph.release()

    def warn(self, topic: str, text: str) -> None:
        """Warn once in a run, when the batch is through: a warning may be an error, and must not end a trace."""
        if topic not in self._warned:
            self._warned.add(topic)
            self._to_tell.append(text)

    def tell(self) -> None:
        """Give the warnings that came up."""
        while self._to_tell:
            rank_zero_warn(self._to_tell.pop(0))

    def fails(self, reason: str) -> None:
        """Say once that a part of the function that runs has no graph.

        Args:
            reason: In words, with the user's line.
        """
        what = "an HPU graph" if self.kind in ("hpu_graph", "direct") else "torch.compile"
        self.warn(f"fails {reason}", f"A part of {self.name} runs without {what}: {reason}.")

    def too_many_shapes(self, limit: int) -> None:
        """Say that graphs are not replaced any longer."""
        self.warn(
            "shapes",
            f"There are more shapes in use than `max_graphs={limit}`: the graphs that there are stay, and batches of"
            " other shapes run plainly. Raise `max_graphs`, or let fewer shapes occur: `bucket_lengths`.",
        )

    def too_little_memory(self) -> None:
        """Say that graphs that were dropped for their memory are not captured again."""
        self.warn(
            "memory",
            "The graphs of all shapes take more than `graph_memory`: those that were dropped are not captured again."
            " Raise it, or let fewer shapes occur: `bucket_lengths`.",
        )

    def cannot_pad(self, reason: str) -> None:
        """Say that a short batch does not fit into a larger graph."""
        self.warn(
            "padding",
            f"`pad_batch` is not used for {self.name}: {reason}. Short batches get graphs of their own, or run"
            " plainly.",
        )

    def partly(self, reason: str) -> None:
        """Note that a part of a traced graph runs plainly behind the captured part."""
        self.counts.reasons[f"partly: {reason}"] += 1

    def too_many_numbers(self) -> None:
        """Note that Python numbers decide what a graph is good for."""
        self.gives_up = "it uses a Python number that changes from call to call, such as `batch_idx`"

    def too_many_host_values(self) -> None:
        """Note that tensors on the host decide what a graph is good for."""
        self.gives_up = "it is given tensors on the host that change from call to call, which no graph can read"

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Surround a capture with this; leaves a clean state if it fails.

        No garbage is collected meanwhile: a graph that dies during the capture of another one silently ends that
        capture (bridge 1.19 `HPUGraph.cpp`, `destroy`).
        """
        enabled = gc.isenabled()
        gc.disable()
        self.capturing = True
        try:
            yield
        except BaseException as error:
            _habana.reset_capture(error)
            raise
        finally:
            self.capturing = False
            if enabled:
                gc.enable()

    def memory_in_use(self) -> int:
        """Device memory in bytes, if anybody asks: waits for the device."""
        if self.config.graph_memory is None:
            return 0
        _habana.mark_step()
        _habana.synchronize()
        return int(_habana.memory_stats(self.device)["InUse"])
