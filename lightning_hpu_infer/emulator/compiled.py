"""``torch.compile(..., backend="hpu_backend")``: dynamo traces, and each of its graphs is one program on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._guards import TracingContext

from lightning_hpu_infer.emulator import runtime
from lightning_hpu_infer.emulator.program import LazyQueue, Program
from lightning_hpu_infer.emulator.runtime import Runtime
from lightning_hpu_infer.emulator.storage import Cell, Spec, Storage
from lightning_hpu_infer.emulator.tensor import HpuTensor, wrap, wrap_view

# What lets dynamo trace through an HpuTensor: the protocol of PyTorch's wrapper subclasses, without inner tensors.
# While dynamo traces, a plain fake tensor on "hpu" stands for each, so that nothing of the emulator runs.


def tensor_flatten(tensor: HpuTensor) -> tuple[list[str], torch.dtype]:
    """Return the inner tensors (none), and what else `tensor_unflatten` needs."""
    return [], tensor.dtype


def tensor_unflatten(inner: dict[str, Any], dtype: torch.dtype, size: Any, stride: Any) -> torch.Tensor:
    """Return the fake tensor that stands for an `HpuTensor` while dynamo traces."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise RuntimeError("tensors of the emulated HPU can be unflattened only where torch.compile traces")
    with context.fake_mode:
        return torch.empty_strided(size, stride, dtype=dtype, device="hpu")


def is_view(tensor: HpuTensor) -> bool:
    """Tell whether autograd knows a base; while tracing none is told, since its views are not this protocol's."""
    return TracingContext.try_get() is None and torch.Tensor._is_view(tensor)


class CompiledGraph:
    """One graph of dynamo's, with what was recorded of it for each layout of its inputs."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        self._forward = module.forward
        self._runtime: Runtime | None = None
        self._recordings: dict[tuple[Any, ...], _Recording] = {}

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Launch the graph as one program."""
        rt = runtime.current()
        rt.touch()
        if rt is not self._runtime:
            self._runtime, self._recordings = rt, {}
        rt.counters.add("compiled_calls")
        key = _key(args)
        if key is None:
            return self._run(rt, args)
        recording = self._recordings.get(key)
        if recording is None:
            recording = _Recording()
            results = self._run(rt, args, recording)
            if not recording.complete:
                return results
            self._recordings[key] = recording
        return recording.launch(rt, args)

    def _run(self, rt: Runtime, args: Sequence[Any], recording: _Recording | None = None) -> Sequence[Any]:
        """Call the graph's ops; fill `recording` instead of launching them, if they can be recorded."""
        for arg in args:
            if isinstance(arg, HpuTensor):
                arg._cell.storage.virgin = False  # or the program would allocate it
        with rt.gather():
            key = _key(args)
            results: Sequence[Any] = self._forward(*args)
            if recording is not None and not rt.interrupted and _key(args) == key:
                recording.fill(rt.queue, args, results)
            if recording is not None and recording.complete:
                rt.queue = LazyQueue()
            else:
                rt.flush("")
        return results


def _key(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return what a recording depends on (modes are guarded by dynamo), or None if host memory is an input."""
    key: list[Any] = []
    first: dict[Cell, int] = {}
    for index, arg in enumerate(args):
        if isinstance(arg, HpuTensor):
            # Two arguments may share memory, which matters to a graph that writes.
            key.append((arg._spec, arg._cell.spec, first.setdefault(arg._cell, index)))
        elif isinstance(arg, torch.Tensor):
            return None
        else:
            key.append((type(arg), arg))
    return tuple(key)


class _Recording:
    """A graph's device work, to be launched with other arguments; each launch makes new results."""

    def __init__(self) -> None:
        self.complete = False
        self._program: Program | None = None
        self._inputs: list[tuple[int, int | Cell]] = []
        """Register, and the argument that it is read from; a cell if it is no argument, such as a constant."""
        self._new: list[tuple[int, Spec]] = []
        self._outputs: list[tuple[str, Any, Spec | None]] = []

    def fill(self, queue: LazyQueue, args: Sequence[Any], results: Sequence[Any]) -> None:
        """Record what the graph has queued; incomplete if a result does not come from the device."""
        sources: dict[Cell, int] = {}
        for index, arg in enumerate(args):
            if isinstance(arg, HpuTensor):
                sources.setdefault(arg._cell, index)
        inputs = dict(queue.inputs)
        new: dict[int, Spec] = {}
        for value in results:
            if not isinstance(value, torch.Tensor):
                self._outputs.append(("value", value, None))
            elif not isinstance(value, HpuTensor):
                return
            elif (same := next((i for i, arg in enumerate(args) if arg is value), None)) is not None:
                self._outputs.append(("argument", same, None))
            elif value._cell in sources:
                self._outputs.append(("view", sources[value._cell], value._spec))
            else:
                register = queue.registers.get(value._cell.storage)
                if register is None or register in inputs:
                    return
                new[register] = value._cell.spec
                self._outputs.append(("new", register, value._spec))
        self._new = list(new.items())
        self._inputs = [(register, sources.get(cell, cell)) for register, cell in queue.inputs]
        self._program = Program(queue.steps, len(queue.storages), list(inputs), list(new))
        self.complete = True

    def launch(self, rt: Runtime, args: Sequence[Any]) -> Sequence[Any]:
        """Queue the program and return its results."""
        assert self._program is not None
        env: list[Storage | None] = [None] * self._program.num_registers
        for register, source in self._inputs:
            cell = source if isinstance(source, Cell) else args[source]._cell
            env[register] = cell.storage
        made: dict[int, Cell] = {}
        for register, layout in self._new:
            storage = env[register] = Storage(rt.memory, layout)
            made[register] = Cell(storage)
        if self._program.steps:
            rt.launch(self._program, env)
        results: list[Any] = []
        for kind, value, spec in self._outputs:
            if spec is None:
                results.append(args[value] if kind == "argument" else value)
            else:
                results.append(wrap(made[value], spec) if kind == "new" else wrap_view(args[value], spec))
        return results
