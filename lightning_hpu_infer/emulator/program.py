"""Programs (the bridge's recipes), and the lazy queue that becomes one at each flush."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_hpu_infer.emulator.plan import Plan, empty_plan
from lightning_hpu_infer.emulator.storage import Cell, Spec, Storage

Step = tuple[Plan, tuple[int, ...], tuple[int, ...]]
_empty_plans: dict[Spec, Plan] = {}


class Program:
    """Steps on numbered registers, with the registers that come from and go to storages."""

    __slots__ = ("computes", "frees", "inputs", "key", "mutated", "num_registers", "outputs", "steps")

    def __init__(
        self, steps: Sequence[Step], num_registers: int, inputs: Sequence[int], outputs: Sequence[int]
    ) -> None:
        self.steps = tuple(steps)
        self.num_registers = num_registers
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.key = (self.steps, self.outputs)
        self.computes = any(plan.computes for plan, _, _ in self.steps)
        """Whether there is more to do than to copy device memory."""
        known = set(self.inputs)
        self.mutated = tuple(sorted({ins[i] for plan, ins, _ in self.steps for i in plan.writes} & known))
        last: dict[int, int] = {}
        for index, (_, ins, outs) in enumerate(self.steps):
            for register in (*ins, *outs):
                last[register] = index
        frees: list[list[int]] = [[] for _ in self.steps]
        for register, index in last.items():
            if register not in known and register not in self.outputs:
                frees[index].append(register)
        self.frees = tuple(map(tuple, frees))

    def __str__(self) -> str:
        """Return a name for metrics: equal programs have equal ones."""
        return f"recipe_{hash(self.key) & 0xFFFF_FFFF_FFFF:012x}"

    def run(self, env: Sequence[Storage | None]) -> None:
        """Execute; `env` has the storage of each input and of each output that a tensor still shows."""
        values: list[object] = [None] * self.num_registers
        for register in self.inputs:
            storage = env[register]
            assert storage is not None
            values[register] = storage.read()
        for (plan, ins, outs), dead in zip(self.steps, self.frees, strict=True):
            plan.execute(values, ins, outs)
            for register in dead:
                values[register] = None
        for register in self.outputs:
            if (storage := env[register]) is not None:
                storage.value = values[register]  # type: ignore[assignment]


class LazyQueue:
    """Ops that were called and not launched."""

    __slots__ = ("inputs", "registers", "steps", "storages")

    def __init__(self) -> None:
        self.registers: dict[Storage, int] = {}
        self.storages: list[Storage] = []
        self.inputs: list[tuple[int, Cell]] = []
        self.steps: list[Step] = []

    def operand(self, cell: Cell) -> int:
        """Return the register of what `cell` points to now: a later replay must not change this op's input."""
        storage = cell.storage
        register = self.registers.get(storage)
        if register is None:
            if storage.virgin:
                # Allocated inside the program, so that every replay of it starts from new memory.
                storage.virgin = False
                plan = _empty_plans.get(storage.spec)
                if plan is None:
                    plan = _empty_plans.setdefault(storage.spec, empty_plan(storage.spec))
                register = self.define(storage)
                self.steps.append((plan, (), (register,)))
            else:
                register = self.define(storage)
                self.inputs.append((register, cell))
        return register

    def define(self, storage: Storage) -> int:
        """Give `storage` the next register."""
        register = self.registers[storage] = len(self.storages)
        self.storages.append(storage)
        return register

    def program(self) -> Program:
        """Compile what is queued; results that no tensor shows any more are not kept."""
        inputs = [register for register, _ in self.inputs]
        outputs = [
            register
            for register in sorted(set(range(len(self.storages))) - set(inputs))
            if self.storages[register].has_live_cell()
        ]
        return Program(self.steps, len(self.storages), inputs, outputs)
