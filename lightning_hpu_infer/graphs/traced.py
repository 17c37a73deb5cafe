"""A function that runs plainly until a shape comes again, and then through what TorchDynamo made of it."""

import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_hpu_infer import _torch
from lightning_hpu_infer.graphs.capture import CapturedGraph
from lightning_hpu_infer.graphs.compiled import CompiledGraph
from lightning_hpu_infer.graphs.context import GraphContext, in_words
from lightning_hpu_infer.graphs.examine import Examination, NotCapturable
from lightning_hpu_infer.graphs.split import rewrite_masks, split
from lightning_hpu_infer.lengths.pad import PadSpec
from lightning_hpu_infer.nested import tensors_in
from lightning_hpu_infer.observer import Stage

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]

# Shapes of calls that are remembered.
_MAX_SHAPES = 4096
# Sets of modes and classes that are traced separately.
_MAX_VARIANTS = 8
# A call that traces adds 1 to a function's debt, any other call takes 1 / 16 off. Above this it is no longer traced.
_MAX_DEBT = 4.5
_CALLS_PER_TRACE = 16
_NEW = "its shapes are new"
NOTHING = "there is nothing in it that TorchDynamo can trace"
TRACING_FAILED = "tracing failed"


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function. Compiled in copies, so that each has a separate cache."""
    return function(*args, **kwargs)


def _run_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module. Dynamo does not guard which one it is, so that modules of one kind share a trace."""
    return _torch.call_module(module, *args, **kwargs)


class TracedCall:
    """A step, a network, or all blocks of one kind.

    A call with shapes that no earlier step had runs plainly, so that a short last batch costs no trace. Main thread
    only.

    Args:
        root: The module whose classes are watched for patches.
        name: What messages call the function.
        context: What the graphs of a run share.
        of_modules: Whether the function given to each call is a module.
    """

    def __init__(self, root: nn.Module, name: str, context: GraphContext, *, of_modules: bool = False) -> None:
        self._root = root
        self.name = name
        self._context = context
        self._template = _run_module if of_modules else _run
        self._of_modules = of_modules
        self._shapes: OrderedDict[Shapes, int] = OrderedDict()
        """The step in which each was first seen; -1 for those that have been traced."""
        self._sizes: dict[Any, list[list[set[int]]]] = {}
        """Per structure of the arguments: up to two sizes seen, by tensor and dimension."""
        self._variants: dict[Any, Callable[..., Any]] = {}
        self._varying: dict[Any, list[tuple[int, int]]] = {}
        """Per structure of the arguments: the dimensions that were marked as dynamic, by tensor."""
        self._come_again = False
        """Whether the shapes of this call came before and have not been traced, so that Dynamo may trace now."""
        self._debt = 0.0
        self._failure: Exception | None = None
        self._with_graphs = self._idle = 0
        """FX graphs that have device graphs, and those that launch nothing."""
        self._without = ""
        """Why a traced part has no graph; empty if all have one."""
        self.given_up = ""
        """Why the function is no longer traced; empty while it may be."""
        self._watch_classes()

    def begin_run(self) -> None:
        """Forget the shapes that were not traced: they may not come again."""
        self._shapes = OrderedDict((shapes, step) for shapes, step in self._shapes.items() if step < 0)
        self._watch_classes()

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the function with these arguments."""
        reason = self._reason_not_to_trace(args, kwargs)
        if reason:
            self._context.counts.plain(reason)
            return _torch.call_module(function, *args, **kwargs) if self._of_modules else function(*args, **kwargs)
        key = _torch.guard_gaps(self._context.device.type), self._classes.now()
        variant = self._variants.get(key)
        first = variant is None
        if variant is None:
            traced = _torch.with_its_code(self._template)
            weakref.finalize(self, _torch.forget_compiled, traced).atexit = False
            variant = _torch.compile_function(traced, self._backend, self._fails, self._timed)
            self._variants[key] = variant
        traces = self._context.counts.traces
        with _torch.dynamic_dims(self._dynamic_dims(args, kwargs) if self._come_again else []):
            output = variant(function, args, kwargs)
        if traces != self._context.counts.traces or first or self._failure is not None or self._context.stop_reason:
            self._traced()
        else:
            self._debt = max(0.0, self._debt - 1 / _CALLS_PER_TRACE)
        return output

    def first(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function plainly, and note the shapes."""
        self._note(self._shapes_of(args, kwargs))
        self._context.counts.plain(_NEW)
        return function(*args, **kwargs)

    # Whether

    def _reason_not_to_trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if self.given_up:
            return self.given_up
        if torch.is_grad_enabled():
            return "gradients are recorded"
        if reason := _torch.must_run_plainly():
            return reason
        shapes = self._shapes_of(args, kwargs)
        seen = self._shapes.get(shapes)
        if seen is None:
            self._note(shapes)
            if not self._may_be_padded(shapes):
                return _NEW
        elif seen == self._context.step:
            return _NEW
        self._come_again = seen != -1
        self._shapes[shapes] = -1
        if len(self._variants) >= _MAX_VARIANTS:
            self.given_up = "modes, or methods of classes, keep changing"
        return ""

    def _shapes_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shapes:
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors_in((args, kwargs)))
        self._structure = tuple((len(shape), dtype) for shape, dtype in shapes)
        return shapes

    def _note(self, shapes: Shapes) -> None:
        self._shapes[shapes] = self._context.step
        if len(self._shapes) > _MAX_SHAPES:
            self._shapes.popitem(last=False)
        sizes = self._sizes.setdefault(self._structure, [[set() for _ in shape] for shape, _ in shapes])
        for dims, (shape, _) in zip(sizes, shapes, strict=True):
            for known, size in zip(dims, shape, strict=True):
                if len(known) < 2:
                    known.add(size)

    def _may_be_padded(self, shapes: Shapes) -> bool:
        """Whether shapes were traced that differ from these in having more rows and nothing else."""
        if not self._context.config.pad_batch:
            return False
        return any(
            step < 0 and len(other) == len(shapes) and all(
                dtype == large_dtype and (shape == large or (shape[1:] == large[1:] and 1 < shape[0] < large[0]))
                for (shape, dtype), (large, large_dtype) in zip(shapes, other, strict=True)
                if shape
            )
            for other, step in self._shapes.items()
        )  # fmt: skip

    def _dynamic_dims(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Tensor, int]]:
        """The dimensions that are known to vary, so that their sizes need no separate traces.

        Where anything varies, token ids and masks are expected to vary in all dimensions. Once dimensions are marked,
        none is added: Dynamo's guards compare the marks, and would trace again for that alone.
        """
        tensors = list(tensors_in((args, kwargs)))
        found = self._varying.get(self._structure)
        if not found:
            found = self._varying[self._structure] = self._find_varying(tensors, args)
        return [(tensors[index], dim) for index, dim in found if tensors[index].shape[dim] > 1]

    def _find_varying(self, tensors: list[Tensor], args: tuple[Any, ...]) -> list[tuple[int, int]]:
        config, found = self._context.config, []
        known = self._sizes.get(self._structure, [])
        vary = any(len(sizes) > 1 for dims in known for sizes in dims)
        for index, (tensor, dims) in enumerate(zip(tensors, known, strict=False)):
            ids = vary and not tensor.is_floating_point()
            found += [(index, dim) for dim, sizes in enumerate(dims) if ids or len(sizes) > 1]
            if config.pad_batch and dims:
                found.append((index, 0))
        if isinstance(config.pad_spec, PadSpec) and args and not self._of_modules:
            indices = {id(tensor): index for index, tensor in enumerate(tensors)}
            found += [(indices[id(t)], dim % t.dim()) for t, dim in config.pad_spec.lengths_in(args[0])]
        return list(dict.fromkeys(found))

    # Tracing

    def _watch_classes(self) -> None:
        self._classes = _torch.ClassFunctions(dict.fromkeys(type(module) for module in self._root.modules()))

    def _backend(self, module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """Called by Dynamo with each FX graph."""
        context = self._context
        context.counts.traces += 1
        context.name = self.name
        if found := _torch.break_of(module):
            context.counts.breaks[found] = context.counts.breaks.get(found, 0) + 1
        rewrite_masks(module)
        if context.kind != "hpu_graph":
            self._with_graphs += 1
            examined: Examination | None = None
            with suppress(NotCapturable):
                examined = Examination(module, context.device.type)
            compiled = _torch.compile_with(context.kind, module, example_inputs)
            return CompiledGraph(module, examined, compiled, context)
        parts = split(module, context.device.type)
        if parts.captured is not None:
            if parts.reason:
                context.counts.reasons[f"partly: {parts.reason}"] += 1
            self._with_graphs += 1
            return CapturedGraph(module, parts, context)
        if not parts.reason:
            self._idle += 1
            return module.forward  # There is nothing to launch.
        self._without = self._without or parts.reason

        def plain(*args: Any) -> Any:
            context.counts.plain(parts.reason)
            return module.forward(*args)

        return plain

    def _timed(self, trace: Callable[[], Any]) -> Any:
        start = perf_counter()
        try:
            return self._context.timed(Stage.TRACE, trace)
        finally:
            self._context.counts.trace_seconds += perf_counter() - start

    def _fails(self, error: Exception) -> None:
        """Called by Dynamo's callback when a frame was not traced, and runs as Python."""
        self._failure = self._failure or error

    def _traced(self) -> None:
        """Decide after a call that traced whether to go on tracing."""
        self._watch_classes()
        self._debt += 1
        failure = ""
        if self._failure is not None:
            error, self._failure = self._failure, None
            failure = f"{TRACING_FAILED}{_torch.line_of(error)} ({in_words(error)})"
        if self._context.stop_reason:
            self.given_up, self._context.stop_reason = self._context.stop_reason, ""
        elif self._debt > _MAX_DEBT:
            self.given_up = "it is traced anew in nearly every call, since it uses a Python value that changes"
        elif not self._with_graphs and (failure or self._without or not self._idle):
            self.given_up = failure or self._without or NOTHING
        elif failure or self._without:
            self._context.warn_of_plain_part(failure or self._without)
