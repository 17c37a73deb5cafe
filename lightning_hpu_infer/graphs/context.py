"""What the graphs of a run share: options, counters, warnings, and the one capture at a time."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.graphs.counts import GraphCounts
from lightning_hpu_infer.graphs.replacements import DataReplacements
from lightning_hpu_infer.links import explained
from lightning_hpu_infer.observer import Observer

_SECTION = "a-part-runs-without-a-graph"


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
        """What messages call the function that was traced last."""
        self.step = 0
        """Number of the batch, over all runs."""
        self.capturing = False
        """Whether a capture is in progress: the bridge refuses a graph inside of another."""
        self.stop_reason = ""
        """Why the function that runs should not be traced any longer; empty while it may."""
        self.timed: Callable[..., Any] = Observer().timed
        self._warned: set[str] = set()
        self._pending: list[str] = []
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def begin(self, observer: Observer) -> None:
        """Begin a run: counters at zero, warnings anew."""
        self.counts = GraphCounts(breaks=self.counts.breaks)
        self.timed = observer.timed
        self._warned.clear()

    def register(self, graph: Any) -> None:
        """Keep a weak reference to what has captured graphs.

        Args:
            graph: Has `release()`, `rebind(now)` and `holds_graphs`, as `GraphStore` does.
        """
        self._graphs.add(graph)

    def graphs(self) -> list[Any]:
        """What was registered and is alive."""
        return list(self._graphs)

    def holds_graphs(self) -> bool:
        """Whether any captured graph exists."""
        return any(graph.holds_graphs for graph in self._graphs)

    def registered(self) -> set[int]:
        """The `id`s of the model's parameters and buffers."""
        root = self._root()
        assert root is not None  # its step is running
        return {id(tensor) for tensor in (*root.parameters(), *root.buffers())}

    def release(self) -> None:
        """Free the device memory of all graphs, of which none may be running.

        The garbage collector may call this in any thread, and when the device is gone, so the device is asked nothing.
        """
        for graph in self.graphs():
            graph.release()

    def warn(self, topic: str, text: str) -> None:
        """Warn once in a run.

        The warning is given after the batch: where warnings are errors, it must not end a trace.

        Args:
            topic: Only the first text of a topic is told.
            text: The message.
        """
        if topic not in self._warned:
            self._warned.add(topic)
            self._pending.append(text)

    def emit_warnings(self) -> None:
        """Give the warnings that have come up."""
        while self._pending:
            rank_zero_warn(self._pending.pop(0))

    def warn_of_plain_part(self, reason: str) -> None:
        """Say once that a part of the function that runs has no graph.

        Args:
            reason: In words, with the user's line.
        """
        what = "an HPU graph" if self.kind in ("hpu_graph", "direct") else "torch.compile"
        self.warn(f"fails {reason}", f"A part of {self.name} runs without {what}: {reason}." + explained(_SECTION))

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Surround a capture with this. If it raises, the bridge's capture state is reset.

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
        """Device memory in use, in bytes; 0 if no `graph_memory` is configured. Waits for the device."""
        if self.config.graph_memory is None:
            return 0
        _habana.mark_step()
        _habana.synchronize()
        return int(_habana.memory_stats(self.device)["InUse"])


def in_words(error: Exception) -> str:
    """An error's class and the first paragraph of its message, up to 300 characters."""
    message = " ".join(str(error).partition("\n\n")[0].split())
    return f"{type(error).__name__}: {message[:300]}"
