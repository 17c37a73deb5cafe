"""What a random program is made of: named choices, each with a default, drawn from a seed."""

import random
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tests.fuzz.listeners import CALLBACKS, CHANGES
from tests.fuzz.modules import HOOKS, OUTPUTS, POSTPROCESSES, STEPS
from tests.fuzz.networks import NETWORKS
from tests.parity.flags import VALUES

END_CALLBACKS = ("clears predictions", "reads progress", "keeps")

FLAGS: dict[str, tuple[Any, ...]] = {name: values for name, values in VALUES.items() if name != "postprocess"} | {
    "hpu_graphs": ("insist", True, False),
    "graph_modules": (None, ("net.body.first",)),
}
"""Flags of the accelerator, the default first; `postprocess` is a choice of the program. Graphs are insisted on, as
these runs are too short for them."""


def one_of(*values: Any, odds: float = 0.4) -> Any:
    """A choice: its values, the default first, and how likely it is another one."""
    return field(default=values[0], metadata={"values": values, "odds": odds})


def named(parts: Any, odds: float) -> Any:
    return one_of(*parts, odds=odds)


@dataclass(frozen=True)
class Program:
    """A user's program: network, step, data, hooks, faults, and how it is run. Printed as its choices."""

    network: str = named(NETWORKS, 0.85)
    step: str = named(STEPS, 0.6)
    output: str = named(OUTPUTS, 0.7)
    postprocess: str = named(POSTPROCESSES, 0.2)
    training: bool = one_of(False, True, odds=0.15)
    """Whether the network is in training mode."""

    container: str = one_of("tensor", "tuple", "list", "dict", "named", "dataclass", "numpy", "text")
    source: str = one_of("dataset", "iterable", "batches", "stored", "unsized", "reused", "same_item", odds=0.5)
    dtype: str = one_of("float32", "int64", "float64", "uint8", odds=0.3)
    rows: int = one_of(11, 8, 17, 2, 50, odds=0.5)
    batch_size: int = one_of(2, 1, 3, odds=0.3)
    loaders: int = one_of(1, 2, odds=0.25)
    augments: bool = one_of(False, True, odds=0.1)
    """Whether the dataset draws random numbers."""
    datamodule: bool = one_of(False, True, odds=0.1)
    workers: int = one_of(0, 1, odds=0.02)

    hook: str = named(HOOKS, 0.45)
    """What the module's own hooks do."""
    callback: str = named(CALLBACKS, 0.4)
    watch: str = one_of("writer", "none", "hooks", "state", odds=0.5)
    """Who records what hooks see: a writer, nobody, or a callback, with the state of the module too."""
    interval: str = one_of("batch", "epoch", "batch_and_epoch", odds=0.5)
    change: str = named(CHANGES, 0.4)
    when: str = one_of("start", "end", "step", odds=0.6)
    """Where the change is made: in a callback's start or end hook, or in the step."""
    at: int = one_of(4, 1, 2, 3, odds=0.6)
    """The batch of the change and of the callback's act."""

    fault: str = one_of(
        *("none", "dataset", "collate", "before", "after", "start", "step", "network", "end", "writer", "epoch_writer"),
        *("on_predict_epoch_start", "on_predict_epoch_end", "on_predict_end"),
        odds=0.25,
    )
    fault_at: int = one_of(3, 1, 2, 5, odds=0.7)
    error: str = one_of("ValueError", "RuntimeError", "KeyError", "MemoryError", "StopIteration", odds=0.4)
    second: str = one_of("none", "again", "changed", "other rows", "other module", odds=0.35)
    """A second run of the same Trainer."""

    precision: str = one_of("32-true", "bf16-mixed", odds=0.04)
    inference_mode: bool = one_of(True, False, odds=0.15)
    limit: int | None = one_of(None, 3, 1, odds=0.12)
    returns: bool = one_of(True, False, odds=0.15)

    profiler: str | None = one_of(None, "simple", odds=0.05)
    bar: bool = one_of(False, True, odds=0.1)

    lazy: bool = one_of(True, False, odds=0.4)
    slow: bool = one_of(False, True, odds=0.3)
    """Whether the emulated device takes a while for each program, so that the host runs ahead of it."""
    fallback: bool = one_of(False, True, odds=0.08)
    """Whether the emulated device has no kernels for some ops."""
    flags: dict[str, Any] = field(default_factory=dict)
    """The accelerator's flags that differ from `FLAGS`' defaults."""

    def __repr__(self) -> str:
        return f"Program({', '.join(f'{name}={value!r}' for name, value in self.chosen().items())})"

    def chosen(self) -> dict[str, Any]:
        """What differs from the defaults."""
        default = {each.name: each.default for each in fields(self) if each.name != "flags"} | {"flags": {}}
        return {name: getattr(self, name) for name, value in default.items() if getattr(self, name) != value}

    def names(self) -> list[str]:
        """The names of the choices that differ from the defaults, each flag for itself."""
        return [*(name for name in self.chosen() if name != "flags"), *self.flags]

    def without(self, names: Collection[str]) -> "Program":
        """This program with the defaults of some choices, unless that makes no sense."""
        defaults: dict[str, Any] = {each.name: each.default for each in fields(self) if each.name in names}
        flags = {name: flag for name, flag in self.flags.items() if name not in names}
        program = replace(self, **defaults, flags=flags)
        return program if program == program.sensible() else self

    @property
    def shares_memory(self) -> bool:
        """Whether stock Lightning on the CPU may hand out memory that is written again.

        On a device each batch and each prediction is a copy. So is an output that is fetched late on the CPU.
        """
        return (
            self.output == "own_buffer"
            or (self.lends and ("x" in self.output or self.network == "identity" or self.callback == "keeps"))
            or ((self.lends or self.container == "numpy") and self.writes_batch)
        )

    @property
    def lends(self) -> bool:
        """Whether batches are memory that is filled again, or that somebody else has."""
        return self.source in ("batches", "stored", "reused", "same_item")

    @property
    def writes_batch(self) -> bool:
        return self.step == "in_place" or self.hook == "start_batch"

    @property
    def rounds(self) -> bool:
        """Whether the device may round in another way than the CPU."""
        return self.precision != "32-true" or self.step == "autocast"

    @property
    def cpu_only(self) -> bool:
        """Whether the emulator lacks what it needs: derivatives."""
        return self.step == "autograd"

    @property
    def unsafe_end(self) -> bool:
        """Whether an end hook is overridden by anything but a writer: then end hooks run in stock Lightning's order."""
        return (
            self.hook.startswith("end")
            or (self.change != "none" and self.when == "end")
            or self.watch in ("hooks", "state")
            or self.fault == "end"
            or self.callback in END_CALLBACKS
        )

    def sensible(self) -> "Program":
        """This program, without choices that exclude each other."""
        program = self
        if self.rounds and (
            self.output in ("argmax", "mask") or self.network in ("branch", "embedding") or self.step == "item"
        ):
            program = replace(program, precision="32-true", step="plain")
        if self.augments and self.workers:
            program = replace(program, augments=False)  # which worker draws which number is not promised
        # A device has a generator of its own for dropout, and whoever asks for a thread gets another order of numbers.
        if self.network == "dropout" or (self.network == "random" and self.flags.get("prefetch")):
            program = replace(program, augments=False, loaders=1)
        if self.postprocess != "none" and self.callback == "replaces step":
            program = replace(program, callback="none")  # it would replace the post-processing too
        if self.fault == "writer" and not (self.watch == "writer" and "batch" in self.interval):
            program = replace(program, watch="writer", interval="batch")
        if self.fault == "writer" or self.postprocess == "fails":
            program = replace(program, second="none")  # steps of later batches may have run already
        if self.fault == "epoch_writer" and not (self.watch == "writer" and "epoch" in self.interval):
            program = replace(program, watch="writer", interval="epoch")
        if self.fault in ("dataset", "collate") and self.source in ("batches", "stored"):
            program = replace(program, fault="none")  # these are made before the run
        if self.container == "numpy" and self.lends and self.callback == "keeps":
            program = replace(program, callback="none")  # arrays stay on the host, where ours are copies
        if self.workers and (self.source != "dataset" or self.fault in ("dataset", "collate")):
            program = replace(program, workers=0)
        if self.flags.get("defer_hooks") is True and program.unsafe_end:
            # Insisting on late hooks is a promise that they may come late.
            program = replace(
                program, flags={name: flag for name, flag in program.flags.items() if name != "defer_hooks"}
            )
        return program


def drawn(seed: int) -> Program:
    """The program of a seed."""
    draw = random.Random(seed)
    choices: dict[str, Any] = {}
    for each in fields(Program):
        if each.name != "flags":
            default, *others = each.metadata["values"]
            choices[each.name] = draw.choice(others) if draw.random() < each.metadata["odds"] else default
    odds = draw.choice([0, 0.1, 0.4])
    flags = {name: draw.choice(values[1:]) for name, values in FLAGS.items() if draw.random() < odds}
    return Program(**choices, flags=flags).sensible()
