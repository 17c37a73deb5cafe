"""One FX graph as a program of a `torch.compile` backend: where there are no HPU graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from lightning_hpu_infer import _torch
from lightning_hpu_infer.graphs.compare import Snapshot
from lightning_hpu_infer.graphs.context import GraphContext, in_words
from lightning_hpu_infer.graphs.examine import Examination
from lightning_hpu_infer.graphs.padding import Padding
from lightning_hpu_infer.graphs.store import Key, PadState, tensor_description
from lightning_hpu_infer.observer import Stage

# Shapes of one FX graph that are remembered.
_MAX_KEYS = 1024


class CompiledGraph:
    """What Dynamo calls in place of one FX graph, in eager mode and on the CPU. Its results are new tensors.

    Weights are inputs of each call, so nothing here depends on their identity. The first calls for each shape are
    compared with the plain ops. Main thread only.

    Args:
        module: The graph as Dynamo traced it.
        examined: What its ops do; None if that is not known, so that it must not run twice for one call.
        compiled: What the backend made of the graph.
        context: What the graphs of a run share.
    """

    def __init__(
        self,
        module: GraphModule,
        examined: Examination | None,
        compiled: Callable[..., Any],
        context: GraphContext,
    ) -> None:
        self._plain = module.forward
        self._compiled = compiled
        self._context = context
        self._where = _torch.users_line(module.graph.nodes)
        nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
        values = [_torch.fake_value(node) for node in nodes]
        self._slots = [i for i, v in enumerate(values) if isinstance(v, Tensor) and not _torch.is_static(nodes[i])]
        self._numbers = [i for i, value in enumerate(values) if not isinstance(value, Tensor)]
        self._written = examined.inputs_in(examined.written) if examined is not None else ()
        verify = context.config.verify_graphs
        self._to_verify = verify + 1 if verify and examined is not None and not examined.random else 0
        self._padding: Padding | None = None
        if context.config.pad_batch and not self._written and examined is not None and (results := examined.returned()):
            self._padding = Padding(context, results, values, self._slots, self._numbers)
        self._left: dict[Key, int] = {}
        """Per shape, the calls that are still to be compared."""
        self._pad_states: dict[Key, PadState] = {}
        """Per shape that fitted into a larger one."""
        self._failed = ""

    def __call__(self, *args: Any) -> Any:
        """Run the program, or the plain ops if it failed."""
        if torch.is_grad_enabled():
            return self._plain(*args)
        if self._failed:
            self._context.counts.plain(self._failed)
            return self._plain(*args)
        descriptions = tuple(tensor_description(args[slot]) for slot in self._slots)
        key = Key(tuple(args[slot] for slot in self._numbers), descriptions)
        left = self._left.get(key)
        if left is None:
            if self._padding is not None:
                if len(self._pad_states) >= _MAX_KEYS:
                    self._pad_states.clear()  # costs a comparison for those that come again
                state = self._pad_states.setdefault(key, PadState())
                fit = self._padding.fit(state, key, (other for other, left in self._left.items() if not left))
                if fit is not None:
                    return tuple(self._padding.run(state, fit, args, self._run, self._plain))
            self._context.counts.captures += 1
            left = self._to_verify
            if len(self._left) >= _MAX_KEYS:
                del self._left[next(iter(self._left))]
        self._left[key] = max(0, left - 1)
        if not left:
            return self._run(args)
        return self._context.timed(Stage.CAPTURE, self._verified, args)

    def _run(self, args: tuple[Any, ...]) -> Any:
        self._context.counts.replays += 1
        return self._context.timed(Stage.REPLAY, self._compiled, *args)

    def _verified(self, args: tuple[Any, ...]) -> Any:
        """Run the program and compare it with the plain ops, whose results the caller gets."""
        before = Snapshot(args[slot] for slot in self._written)
        try:
            results = self._run(args)
        except Exception as error:
            before.restore()
            self._failed = f"compiling failed ({in_words(error)})"
            expected = self._plain(*args)
        else:
            expected, differs = before.compare(results, lambda: self._plain(*args))
            self._context.counts.verified += 1
            if differs:
                self._failed = f"its program differs from the plain ops ({differs})"
        if self._failed:
            self._context.warn_of_plain_part(f"{self._failed}{self._where}")
        return expected
