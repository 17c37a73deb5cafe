"""One FX graph as a program of a `torch.compile` backend: where there are no HPU graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from lightning_hpu_infer import _torch
from lightning_hpu_infer.graphs.compare import difference
from lightning_hpu_infer.graphs.context import GraphContext
from lightning_hpu_infer.graphs.padding import Fit, Padding
from lightning_hpu_infer.graphs.split import Split
from lightning_hpu_infer.graphs.store import Key
from lightning_hpu_infer.observe.spans import Stage

# Shapes of one FX graph that are remembered.
_MAX_KEYS = 1024


class CompiledGraph:
    """What Dynamo calls in place of one FX graph, in eager mode and on the CPU. Its results are new tensors.

    Weights are inputs of each call, so nothing here depends on their identity. The first calls for each shape are
    compared with the plain ops. Main thread only.

    Args:
        module: The graph as Dynamo traced it.
        parts: Only what it says of writes and random ops is used.
        compiled: What the backend made of the graph.
        context: What the graphs of a run share.
    """

    def __init__(self, module: GraphModule, parts: Split, compiled: Callable[..., Any], context: GraphContext) -> None:
        self._plain = module.forward
        self._compiled = compiled
        self._context = context
        self._where = _torch.users_line(module.graph.nodes)
        self._written = parts.changed
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        values = [_torch.fake_value(node) for node in nodes]
        self._places = [i for i, v in enumerate(values) if isinstance(v, Tensor) and not _torch.is_static(nodes[i])]
        self._numbers = [i for i, value in enumerate(values) if not isinstance(value, Tensor)]
        verify, may_pad = context.config.verify_graphs, context.config.pad_batch and not parts.changed
        self._to_verify = 0 if parts.random or not verify else verify + 1
        self._padding: Padding | None = None
        if may_pad and parts.outputs:
            self._padding = Padding(parts.outputs, values, self._places, self._numbers)
        self._left: dict[Any, int] = {}
        """Per shape, the calls that are still to be compared."""
        self._padded: dict[Any, bool] = {}
        """Shapes with fewer rows than another, and whether they may be padded."""
        self._failed = ""
        context.register(self)

    def __call__(self, *args: Any) -> Any:
        """Run the program, or the plain ops if it failed."""
        if torch.is_grad_enabled():
            return self._plain(*args)
        if self._failed:
            self._context.counts.plain(self._failed)
            return self._plain(*args)
        descriptions = tuple(_torch.tensor_description(args[place]) for place in self._places)
        key = tuple(args[place] for place in self._numbers), descriptions, 0
        left = self._left.get(key)
        if left is None:
            if self._padding is not None and (fit := self._fit(self._padding, key)) is not None:
                return self._run_padded(self._padding, fit, key, args)
            self._context.counts.captures += 1
            left = self._to_verify
            if len(self._left) >= _MAX_KEYS:
                del self._left[next(iter(self._left))]
        self._left[key] = max(0, left - 1)
        if not left:
            return self._run(args)
        return self._context.timed(Stage.CAPTURE, self._verified, args)

    def _fit(self, padding: Padding, key: Key) -> Fit | None:
        if not self._padded.get(key, True):
            return None
        fit = padding.fit(key, (other for other, left in self._left.items() if not left))
        if fit is not None and (reason := padding.unfit(fit)):
            self._padded[key] = False
            self._context.cannot_pad(reason)
            return None
        return fit

    def _run_padded(self, padding: Padding, fit: Fit, key: Key, args: tuple[Any, ...]) -> Any:
        """Run a short batch with the rows of a larger one, compared with the plain ops the first time."""
        results = padding.cut(self._run(padding.pad(args, fit)), fit)
        self._context.counts.padded += 1
        if key in self._padded:
            return tuple(results)
        expected = self._plain(*args)
        self._context.counts.verified += 1
        differs = difference(results, expected)
        self._padded[key] = not differs
        if differs:
            self._context.cannot_pad(f"rows added to a short batch change the others: {differs}")
        return expected

    def release(self) -> None:
        """Nothing is held between calls."""

    def rebind(self, now: dict[int, Tensor | None]) -> None:
        """Weights are inputs of each call."""

    holds_graphs = False

    def _run(self, args: tuple[Any, ...]) -> Any:
        self._context.counts.replays += 1
        return self._context.timed(Stage.REPLAY, self._compiled, *args)

    def _verified(self, args: tuple[Any, ...]) -> Any:
        """Run the program and compare it with the plain ops, whose results the caller gets."""
        written = [args[place] for place in self._written]
        saved = [tensor.clone() for tensor in written]
        try:
            results = [leaf for leaf in tree_leaves(self._run(args)) if isinstance(leaf, Tensor)]
            # They may be the memory that is put back to its former values below.
            results, after = [leaf.clone() for leaf in results], [tensor.clone() for tensor in written]
        except Exception as error:
            message = " ".join(str(error).split("\n\n")[0].split())
            results, after, self._failed = [], [], f"compiling failed ({type(error).__name__}: {message})"
        for tensor, value in zip(written, saved, strict=True):
            tensor.copy_(value)
        expected = self._plain(*args)
        if not self._failed:
            self._context.counts.verified += 1
            plain = [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]
            if found := difference([*results, *after], [*plain, *written]):
                self._failed = f"its program differs from the plain ops ({found})"
        if self._failed:
            self._context.fails(f"{self._failed}{self._where}")
        return expected
