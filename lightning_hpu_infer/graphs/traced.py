"""A function that runs plainly until tracing it pays, and then through what TorchDynamo made of it."""

import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lightning_hpu_infer import _torch
from lightning_hpu_infer.graphs.capture import CapturedGraph
from lightning_hpu_infer.graphs.compiled import CompiledGraph
from lightning_hpu_infer.graphs.context import GraphContext
from lightning_hpu_infer.graphs.split import split
from lightning_hpu_infer.lengths.pad import PadSpec

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]

# Shapes of calls that are remembered.
_MAX_SHAPES = 4096
# Sets of modes and classes that are traced apart.
_MAX_VARIANTS = 8
# So many more calls that trace than what pays for them, and a function is no longer traced.
_MAX_DEBT = 4.5
# Calls without tracing that pay for one with.
_CALLS_PER_TRACE = 16
_NEW = "its shapes are new"
NOTHING = "there is nothing in it that TorchDynamo can trace"
TRACING_FAILED = "tracing failed"


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compiled in copies, each with a cache of its own."""
    return function(*args, **kwargs)


def _run_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Likewise. Dynamo does not guard which module it is, so that like modules share what was traced."""
    return _torch.call_module(module, *args, **kwargs)


class TracedCall:
    """A step, a network, or all blocks of one kind.

    A call with shapes that no earlier step had runs plainly, so that a short last batch costs no trace. Main thread
    only.

    Args:
        root: The module whose classes decide what a call does.
        name: What messages call it.
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
        """Per kind of arguments: up to two sizes seen, by tensor and dimension."""
        self._variants: dict[Any, Callable[..., Any]] = {}
        self._varying: dict[Any, list[tuple[int, int]]] = {}
        """Per kind of arguments: the dimensions that Dynamo was told to vary, by tensor."""
        self._come_again = False
        """Whether shapes that were not traced came for the second time."""
        self._classes = _torch.ClassFunctions(())
        self._debt = 0.0
        self._failure: Exception | None = None
        self._with_graphs = self._idle = 0
        self._without = ""
        """Why a part of what was traced has no graph."""
        self.given_up = ""
        """Why it is traced no longer; empty while it may be."""

    def begin_run(self) -> None:
        """Forget shapes that were not traced: they may not come again."""
        self._shapes = OrderedDict((shapes, step) for shapes, step in self._shapes.items() if step < 0)
        self._look_at_classes()

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
            variant = _torch.compile_function(traced, self._backend, self._fails, self._took)
            self._variants[key] = variant
        traces = self._context.counts.traces
        if self._come_again:
            # Dynamo may trace now.
            with _torch.dynamic_dims(self._dynamic_dims(args, kwargs)):
                output = variant(function, args, kwargs)
        else:
            output = variant(function, args, kwargs)
        if traces != self._context.counts.traces or first or self._failure is not None or self._context.gives_up:
            self._traced()
        else:
            self._debt = max(0.0, self._debt - 1 / _CALLS_PER_TRACE)
        return output

    def first(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function plainly, and remember the shapes."""
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
        """Whether a larger batch was traced, of which this one has only fewer rows."""
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
        """The dimensions that are known to vary, so that they need no trace of their own.

        Where anything varies, token ids and masks are expected to vary in all dimensions. Once something was said to
        vary, nothing is added: Dynamo's guards compare it, and would trace anew for that alone.
        """
        tensors = list(tensors_in((args, kwargs)))
        found = self._varying.get(self._structure)
        if not found:
            found = self._varying[self._structure] = self._find_varying(tensors, args)
        return [(tensors[place], dim) for place, dim in found if tensors[place].shape[dim] > 1]

    def _find_varying(self, tensors: list[Tensor], args: tuple[Any, ...]) -> list[tuple[int, int]]:
        config, found = self._context.config, []
        known = self._sizes.get(self._structure, [])
        vary = any(len(sizes) > 1 for dims in known for sizes in dims)
        for place, (tensor, dims) in enumerate(zip(tensors, known, strict=False)):
            ids = vary and not tensor.is_floating_point()
            found += [(place, dim) for dim, sizes in enumerate(dims) if ids or len(sizes) > 1]
            if config.pad_batch and dims:
                found.append((place, 0))
        if isinstance(config.pad_spec, PadSpec) and args and not self._of_modules:
            places = {id(tensor): place for place, tensor in enumerate(tensors)}
            found += [(places[id(t)], dim % t.dim()) for t, dim in config.pad_spec.lengths_in(args[0])]
        return list(dict.fromkeys(found))

    # Tracing

    def _look_at_classes(self) -> None:
        self._classes = _torch.ClassFunctions(dict.fromkeys(type(module) for module in self._root.modules()))

    def _backend(self, module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        """Called by Dynamo with each FX graph."""
        context = self._context
        context.counts.traces += 1
        context.name = self.name
        parts = split(module, context.device.type)
        if context.kind != "hpu_graph":
            self._with_graphs += 1
            return CompiledGraph(module, parts, _torch.compile_with(context.kind, module, example_inputs), context)
        if parts.captured is not None:
            if parts.reason:
                context.partly(parts.reason)
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

    def _took(self, seconds: float) -> None:
        self._context.counts.trace_seconds += seconds

    def _fails(self, error: Exception) -> None:
        """Called by Dynamo's callback: a frame was not traced, and runs as Python."""
        self._failure = self._failure or error

    def _traced(self) -> None:
        """Judge after a call that traced whether that leads anywhere."""
        self._look_at_classes()
        self._debt += 1
        failure = ""
        if self._failure is not None:
            error, self._failure = self._failure, None
            message = " ".join(str(error).split("\n\n")[0].split())[:300]
            failure = f"{TRACING_FAILED}{_torch.line_of(error)} ({type(error).__name__}: {message})"
        if self._context.gives_up:
            self.given_up, self._context.gives_up = self._context.gives_up, ""
        elif self._debt > _MAX_DEBT:
            self.given_up = "it is traced anew in nearly every call, since it uses a Python value that changes"
        elif not self._with_graphs and (failure or self._without or not self._idle):
            self.given_up = failure or self._without or NOTHING
        elif failure or self._without:
            self._context.fails(failure or self._without)


def tensors_in(data: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, in order. What is unknown is passed over."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping | UserDict):
        for value in data.values():
            yield from tensors_in(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from tensors_in(value)
    elif is_dataclass(data) and not isinstance(data, type):
        for each in fields(data):
            yield from tensors_in(getattr(data, each.name, None))
