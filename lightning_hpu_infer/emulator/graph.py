"""Graph capture and replay at the C level: ``_hpu_C.HPUGraph`` and its functions."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from lightning_hpu_infer.emulator import runtime
from lightning_hpu_infer.emulator.program import LazyQueue, Program, Step
from lightning_hpu_infer.emulator.storage import Cell, Spec, Storage
from lightning_hpu_infer.emulator.tensor import HpuTensor, wrap

_PREFIX = "[Rank:0] FATAL ERROR :: MODULE:PT_DEVICE "


def _fatal(text: str) -> RuntimeError:
    return RuntimeError(_PREFIX + text)


class HPUGraph:
    """A recorded program with the cells its inputs come from and its outputs go to."""

    def __init__(self) -> None:
        self._runtime = runtime.current()
        self._registers: dict[Storage, int] = {}
        self._storages: list[Storage] = []
        self._steps: list[Step] = []
        self._inputs: list[tuple[int, Spec, Cell | None]] = []
        self._outputs: list[tuple[int, Spec, weakref.ref[Cell]]] = []
        self._program: Program | None = None
        self._retained: list[Storage] = []
        self._stream_id = 0
        self._capturing = False
        """Whether this graph began to record and did not end; the bridge keeps it beside the state of the process."""
        self._user_sizes: list[tuple[int, ...]] = []
        self._in_out: set[int] = set()
        self._outputs_are_marked = False
        self._user_slots: dict[int, int] = {}
        """Index of a marked input -> its register, for the inputs that the graph reads directly."""

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not _ending():  # the modules that this needs may be gone, `sys` too
            self.destroy()

    # Capture

    def capture_begin(self, *, dry_run: bool) -> None:
        """Record everything that is launched from now on.

        Dynamic-shape refinement is switched off, and no capture or replay switches it on again. If another graph
        records, this fails after the flags were set, so that both are then in doubt (bridge: HPUGraph.cpp:35-66,
        lazy_executor.h:254-257).
        """
        rt = runtime.current()
        if self._capturing:
            raise _fatal("GRAPH:: graph Capture already in progress")
        if self._program is not None:
            raise NotImplementedError(
                "this HPUGraph holds a capture already; the bridge would add a second one and replay both, which is not"
                " emulated. Call reset() first, or capture into a new HPUGraph"
            )
        rt.flush("capture")
        self._stream_id = rt.stream_id
        rt.settings["dynamic_shape"] = False
        self._capturing = rt.capture.capturing = True
        if rt.capture.graph is not None:
            raise RuntimeError(
                "Expected m_captured_hpu_graph == nullptr || hpu_graph == nullptr to be true, but got false."
            )
        rt.capture.graph, rt.capture.dry_run = self, dry_run
        rt.counters.add("captures")

    def mark_user_inputs(self, tensors: Sequence[Any]) -> None:
        """Name the caller's tensors, to be matched with the inputs of what is recorded."""
        if not self._capturing:
            raise _fatal("GRAPH:: mark_user_inputs must be while capturing in progress")
        # The tensor object may be a view or detach of the user's: what counts is its cell and layout.
        runtime.current().capture.marked_inputs = [
            wrap(t._cell, t._spec) if isinstance(t, HpuTensor) else t for t in tensors
        ]
        self._user_sizes += [tuple(tensor.shape) for tensor in tensors]

    def append(self, queue: LazyQueue) -> None:
        """Record one flushed program."""
        self._check_stream(runtime.current())
        inputs = dict(queue.inputs)
        renamed: list[int] = []
        for register, storage in enumerate(queue.storages):
            known = self._registers.get(storage)
            if known is None:
                known = self._registers[storage] = len(self._storages)
                self._storages.append(storage)
                if register in inputs:
                    self._inputs.append((known, storage.spec, inputs[register]))
            renamed.append(known)
        for plan, ins, outs in queue.steps:
            self._steps.append((plan, tuple(renamed[i] for i in ins), tuple(renamed[o] for o in outs)))

    def capture_end(self) -> None:
        """Stop recording and make the recorded programs one; does nothing if this graph does not record."""
        rt = runtime.current()
        if not self._capturing:
            return
        self._check_stream(rt)
        rt.flush("capture")
        state = rt.capture
        self._finish(state.marked_inputs, keep=not state.dry_run)
        self._capturing = state.capturing = state.dry_run = False
        state.graph, state.marked_inputs = None, []

    def _check_stream(self, rt: runtime.Runtime) -> None:
        if rt.stream_id != self._stream_id:
            raise _fatal("GRAPH:: Capture must end on the same stream it began on.")

    def _finish(self, marked: Sequence[Any], *, keep: bool) -> None:
        fed = {register for register, _, _ in self._inputs}
        produced = [r for r in range(len(self._storages)) if r not in fed]
        alive = [r for r in produced if self._storages[r].has_live_cell()]
        for register in alive:
            ref = self._storages[register].cell_ref
            assert ref is not None
            self._outputs.append((register, self._storages[register].spec, ref))
        if self._steps:  # nothing is recorded in eager mode, or between two step markers (bridge: HPUGraph.cpp:147)
            self._program = Program(self._steps, len(self._storages), [r for r, _, _ in self._inputs], alive)
        by_cell = {id(cell): register for register, _, cell in self._inputs}
        for index, tensor in enumerate(marked):
            if isinstance(tensor, HpuTensor) and tensor._spec is tensor._cell.spec:
                slot = by_cell.get(id(tensor._cell))
                if slot is not None:
                    self._user_slots[index] = slot
        # Without the tensor cache intermediates are freed after their last use (bridge: HPUGraph.cpp:258-391).
        self._retained = [self._storages[r] for r in produced if r not in set(alive)] if keep else []
        self._storages, self._registers, self._steps = [], {}, []

    # Replay

    def replay(self) -> None:
        """Run the recorded program on what its inputs hold now, into new output memory."""
        self._prepare()
        self._launch({})

    def replay_with(self, tensors: Sequence[Any]) -> None:
        """Run with the caller's tensors instead of the matched inputs (``replayV3``)."""
        self._prepare()
        if self._program is None:
            return
        if len(tensors) < len(self._user_sizes):
            raise IndexError(f"{len(self._user_sizes)} inputs were marked, {len(tensors)} given")  # vector::at
        for index, size in enumerate(self._user_sizes):
            if tuple(tensors[index].shape) != size:
                raise _fatal(
                    "HPU GRAPH:: Mark User Input Sizes is not same Replay Input Sizes"
                    f" (input {index}: marked {size}, given {tuple(tensors[index].shape)})"
                )
        bound: dict[int, Storage] = {}
        copies = []
        for index, register in self._user_slots.items():
            tensor = tensors[index]
            if tensor._spec is not tensor._cell.spec:
                tensor = tensor.detach().clone()
                copies.append(tensor)
            bound[register] = tensor._cell.storage
        runtime.current().flush("replay")
        self._launch(bound)
        # The first tensors are not kept, since each call brings new ones (bridge: HPUGraph.cpp:547-553).
        self._drop(set(self._user_slots.values()))

    def _prepare(self) -> None:
        rt = runtime.current()
        rt.touch()
        if self._capturing:
            raise _fatal("GRAPH:: Capture in progress")
        rt.settings["dynamic_shape"] = False
        rt.flush("replay")

    def _launch(self, bound: dict[int, Storage]) -> None:
        rt = runtime.current()
        if self._program is None:
            return
        env: list[Storage | None] = [None] * self._program.num_registers
        for register, spec, cell in self._inputs:
            storage = bound.get(register) or (cell.storage if cell is not None else None)
            if storage is None:
                raise RuntimeError("Tensor Data not present in ExecuteCachedGraph")
            if storage.spec.dtype is not spec.dtype:
                raise RuntimeError(
                    f"a graph input was captured with {spec.dtype} and replayed with {storage.spec.dtype}; the real"
                    " bridge does not check this and reads wrong bytes. Capture one graph per dtype"
                )
            env[register] = storage
        for register, spec, ref in self._outputs:
            if (cell := ref()) is not None:
                env[register] = cell.storage = Storage(rt.memory, spec)
        rt.counters.add("replays")
        if self._program.steps:
            rt.launch(self._program, env)

    # Bookkeeping

    def mark_user_outputs(self, tensors: Sequence[Any]) -> None:
        """Keep only these outputs; the memory of others is freed after their last use."""
        if self._capturing:
            raise _fatal("GRAPH:: Capture in progress")
        if self._outputs_are_marked:
            raise RuntimeError("Error:mark_user_outputs is called more than once for the same graph?")
        if self._program is None:
            return
        wanted = {id(tensor._cell) for tensor in tensors if isinstance(tensor, HpuTensor)}
        self._outputs = [output for output in self._outputs if id(output[2]()) in wanted]
        self._outputs_are_marked = bool(self._outputs)
        written = set(self._program.mutated)
        self._in_out = {r for r, _, cell in self._inputs if r in written and id(cell) not in wanted}

    def match_indices(self) -> set[int]:
        """Return which marked inputs the graph reads directly, not through a view."""
        return set(self._user_slots)

    def clear_inputs(self) -> None:
        """Drop inputs that the graph writes and that no marked output shows; it cannot be replayed then.

        Does nothing without marked outputs (bridge: HPUGraph.cpp:187-194, 330-341, which drops their memory for all).
        """
        self._drop(self._in_out)

    def _drop(self, registers: Collection[int]) -> None:
        self._inputs = [(r, spec, None if r in registers else cell) for r, spec, cell in self._inputs]

    def destroy(self) -> None:
        """Free what was recorded.

        This ends any capture, also another graph's, but leaves `dry_run` and the marked inputs as they are, and this
        graph as one that records if it did (bridge: HPUGraph.cpp:115-127, 449-457).
        """
        rt = runtime.installed()
        if rt is not None and rt is self._runtime and rt.capture.capturing:
            rt.capture.capturing, rt.capture.graph = False, None
            rt.counters.add("captures_failed")
        self._program, self._inputs, self._outputs, self._retained = None, [], [], []
        self._user_slots, self._in_out, self._outputs_are_marked = {}, set(), False


def view_hash(tensor: torch.Tensor) -> int:
    """Return what tells a view from its base in `input_hash`: 0 unless it is a lazy view (bridge: bindings.cpp:263)."""
    if not isinstance(tensor, HpuTensor) or not runtime.current().config.lazy:
        return 0
    spec = tensor._spec
    return 0 if spec is tensor._cell.spec else hash((spec.size, spec.stride, spec.offset)) or 1
