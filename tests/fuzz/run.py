"""One program on stock Lightning, on the plugin on the CPU, and on the emulated HPU without and with its flags."""

import math
import random
import threading
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.config import InferenceConfig
from tests.fuzz.data import make_loaders
from tests.fuzz.listeners import BRIDGE_NAMES, Fault, Log, make_callbacks, names_in
from tests.fuzz.modules import POSTPROCESSES, make_module
from tests.fuzz.program import FLAGS, Program
from tests.helpers import ALL_OFF, running, trainer
from tests.parity.recorder import host

ROUNDED = 0.05
"""Tolerance where the device may round, and choose dtypes, in another way than the CPU."""
BRIDGE = ("lightning_hpu_infer.emulator", "habana_frameworks")
"""Where the hooks of the bridge are from that name modules."""


@dataclass
class Outcome:
    """All that one or two runs of a program show."""

    results: list[Any] = field(default_factory=list)
    """Per run its predictions, or its error."""
    log: Log = field(default_factory=Log)
    progress: list[Any] = field(default_factory=list)
    """Per run what is left in the loop."""
    state: dict[str, Any] = field(default_factory=dict)
    """Weights and buffers afterwards."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Per submodule its other attributes."""
    names: dict[str, Any] = field(default_factory=dict)
    """Per submodule the names of all attributes, and how many hooks there are."""
    threads: int = 0
    """Threads that are still there."""


def run(program: Program, accelerator: Any) -> Outcome:
    """Run a program once, or twice if it says so."""
    outcome, fault = Outcome(), Fault(program.fault, program.fault_at, program.error)
    # Post-processing is the step's where the accelerator does not do it.
    in_step = not isinstance(accelerator, HPUInferenceAccelerator) or accelerator.config.postprocess is None
    make = partial(make_module, log=outcome.log, fault=fault, postprocesses=in_step)
    module = make(program)
    ours = trainer(
        accelerator,
        make_callbacks(program, outcome.log, fault),
        precision=program.precision,
        inference_mode=program.inference_mode,
        limit_predict_batches=program.limit,
        profiler=program.profiler,
        enable_progress_bar=program.bar,
    )
    loaders = make_loaders(program, fault)
    before = running()
    for second in range(1 if program.second == "none" else 2):
        if second and program.second == "changed":
            with torch.inference_mode():  # a copy that was made in a run is of such tensors
                module.net.body.first.weight.mul_(2)
            module.net.factor += 1
        if second and program.second == "other module":
            module = make(replace(program, network="norm"))
        if second and program.second == "other rows":
            loaders = make_loaders(program, fault, more=2)
        outcome.log.note("run", "run", second)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            outcome.results.append(host(ours.predict(module, **loaders, return_predictions=program.returns)))
        except Exception as error:
            outcome.results.append(f"{type(error).__name__}: {error}")
        outcome.progress.append(_left_in_loop(ours))
    outcome.threads = running() - before
    outcome.state = host(dict(module.state_dict()))
    for name, part in module.named_modules():
        outcome.attributes[name] = _attributes(part)
        outcome.names[name] = (
            type(part).__name__,
            names_in(part),
            [_users(part._forward_hooks), _users(part._forward_pre_hooks)],
        )
    return outcome


def _left_in_loop(ours: Any) -> dict[str, Any]:
    loop = ours.predict_loop
    return {
        "progress": loop.batch_progress.state_dict(),
        "predictions": host(loop._predictions),
        "indices": [[list(batch) for batch in loader] for loader in loop.epoch_batch_indices],
        "status": ours.state.status.value,
        "batches": ours.num_predict_batches,
        "step": "predict_step" in vars(ours.strategy),
    }


def _attributes(part: nn.Module) -> dict[str, Any]:
    kinds: Any = int | float | bool | str | list | dict | Tensor | None
    own = {name: value for name, value in vars(part).items() if isinstance(value, kinds) and name[0] != "_"}
    if isinstance(part, LightningModule):
        own = {name: own.get(name) for name in ("steps", "box", "last", "buffer")}
    return {name: host(value) for name, value in own.items() if name not in BRIDGE_NAMES}


def _users(hooks: dict[int, Any]) -> int:
    """How many hooks there are that the bridge did not put there."""
    return sum(not getattr(hook, "__module__", "").startswith(BRIDGE) for hook in hooks.values())


def flags_of(program: Program) -> dict[str, Any]:
    """The accelerator's arguments on the emulated HPU."""
    flags = {name: flag for name, flag in program.flags.items() if name != "hpu_graphs"}
    graphs = program.flags.get("hpu_graphs", FLAGS["hpu_graphs"][0])
    flags["postprocess"] = POSTPROCESSES[program.postprocess]
    return flags | {"hpu_graphs": ("hpu_graph" if program.lazy else "compile") if graphs == "insist" else graphs}


KINDS = ("cpu", "off", "on")
"""On the CPU other than stock; on the HPU without flags other than stock; with flags other than without."""


def failures(program: Program, kinds: Collection[str] = KINDS) -> dict[str, str]:
    """How a program differs, in a process that has traced nothing yet, per kind of those asked for."""
    warnings.simplefilter("ignore")
    found: dict[str, str] = {}
    stock = None if set(kinds) == {"on"} else run(program, "cpu")
    if "cpu" in kinds and stock is not None:
        accelerator = HPUInferenceAccelerator(**flags_of(program) | {"hpu_graphs": False})
        config = accelerator.config
        if not (program.shares_memory and (_overlaps(config, "cpu") or config.pipelining == "auto")):
            found |= _compared("cpu", program, run(program, accelerator), stock, config)
    if program.cpu_only or set(kinds) == {"cpu"}:
        return found
    fallbacks = frozenset({"aten::relu", "aten::tanh"} if program.fallback else ())
    emulator.install(
        emulator.EmulatorConfig(lazy=program.lazy, program_ms=2.0 if program.slow else 0.0, cpu_fallback_ops=fallbacks)
    )
    try:
        accelerator = HPUInferenceAccelerator(**ALL_OFF)
        off = run(program, accelerator)
        if "off" in kinds and stock is not None and not program.shares_memory:
            found |= _compared("off", program, off, stock, accelerator.config, ROUNDED if program.rounds else 1e-3)
        if "on" in kinds:
            accelerator = HPUInferenceAccelerator(**flags_of(program))
            found |= _compared("on", program, run(program, accelerator), off, accelerator.config)
    finally:
        emulator.uninstall()
    return found


def _overlaps(config: InferenceConfig, device: str) -> bool:
    """Whether batches are finished while later ones run."""
    return bool(config.in_flight_depth(device) or config.postprocess)


def _compared(
    kind: str, program: Program, ours: Outcome, other: Outcome, config: InferenceConfig, tolerance: float = 1e-4
) -> dict[str, str]:
    try:
        compare(program, ours, other, config, "hpu" if kind == "on" else "cpu", tolerance, emulated=kind == "off")
    except AssertionError as error:
        return {kind: str(error)[:1000]}
    return {}


def compare(
    program: Program,
    ours: Outcome,
    stock: Outcome,
    config: InferenceConfig,
    device: str,
    tolerance: float = 1e-4,
    *,
    emulated: bool = False,
) -> None:
    """Everything equal that a promise makes equal.

    Args:
        program: What was run.
        ours: What came of it.
        stock: What should have.
        config: The accelerator's flags.
        device: "hpu" or "cpu".
        tolerance: Relative and absolute.
        emulated: Whether only one of the two is on the emulator, which names modules by attributes of theirs.
    """
    if program.network == "dropout":
        tolerance = max(tolerance, 0.1)
    # End hooks that run late run beside later batches. Then a listener's hooks are in order, each kind by itself.
    late = bool(config.pipelining and _overlaps(config, device) and config.defer_hooks)
    late = late and not (config.defer_hooks == "auto" and program.unsafe_end)
    # An end hook that fails late fails when later batches have begun.
    ahead = late and (program.fault in ("end", "writer") or program.postprocess == "fails")
    same(ours.results, stock.results, "results", tolerance)
    for listener, hook in {event[:2]: None for event in stock.log.events + ours.log.events}:
        theirs = [event for event in stock.log.events if event[:2] == (listener, hook)]
        found = [event for event in ours.log.events if event[:2] == (listener, hook)]
        if ahead and (hook == "start" or (hook == "epoch" and program.error == "StopIteration")):
            continue
        same(found, theirs, f"{listener} {hook}", tolerance)
    if not late:
        order, stocks = ([event[:2] for event in each.log.events] for each in (ours, stock))
        same(order, stocks, "order of hooks", 0)
    if not ahead:
        if program.postprocess != "fails":  # where the step is done, and only what follows it failed
            same(ours.progress, stock.progress, "loop", tolerance)
        same(ours.state, stock.state, "state", tolerance)
        same(ours.attributes, stock.attributes, "attributes", tolerance)
    if not emulated:
        same(ours.names, stock.names, "names", 0)
    # Feeders of worker processes end when they are collected.
    assert program.workers or ours.threads <= stock.threads, f"threads: {threading.enumerate()}"


def same(actual: Any, expected: Any, where: str, tolerance: float) -> None:
    """Equal in structure and type; tensors equal in dtype, shape and, within tolerance, in value."""
    if isinstance(expected, Tensor | np.ndarray):
        assert isinstance(actual, type(expected)), f"{where}: {actual!r} instead of {expected!r}"
        one, other = torch.as_tensor(actual), torch.as_tensor(expected)
        bounds: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "check_dtype": tolerance < ROUNDED}
        torch.testing.assert_close(one, other, **bounds, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, list | tuple):
        assert type(actual) is type(expected), f"{where}: {actual!r} instead of {expected!r}"
        assert len(actual) == len(expected), f"{where}: {len(actual)} instead of {len(expected)}: {actual}"
        for place, (one, other) in enumerate(zip(actual, expected, strict=True)):
            same(one, other, f"{where}[{place}]", tolerance)
    elif isinstance(expected, dict):
        assert isinstance(actual, dict), f"{where}: {actual!r} instead of {expected!r}"
        assert list(actual) == list(expected), f"{where}: {list(actual)} instead of {list(expected)}"
        for name in expected:
            same(actual[name], expected[name], f"{where}.{name}", tolerance)
    elif isinstance(expected, float) and isinstance(actual, float):
        close = math.isclose(actual, expected, rel_tol=tolerance, abs_tol=tolerance)
        assert close or math.isnan(actual) == math.isnan(expected) == 1, f"{where}: {actual!r} instead of {expected!r}"
    else:
        assert actual == expected, f"{where}: {actual!r} instead of {expected!r}"
