"""Predictions of a dozen models: each technique against none, and none against the CPU."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from lightning_hpu_infer.verify.check import Broken, Check, Kind, Seen
from lightning_hpu_infer.verify.compare import CPU_TOLERANCES, DEVICE_TOLERANCES, Distance, distance
from lightning_hpu_infer.verify.models import CASES
from lightning_hpu_infer.verify.predict import ALL_OFF, Run, check_graphs, insisting, predict

NONE = "all off"
EVERYTHING = "all on"
TECHNIQUES: dict[str, Callable[[], dict[str, Any]]] = {
    "hpu_graphs": lambda: {"hpu_graphs": insisting(), "verify_graphs": 0},
    "async_copy": lambda: {"async_copy": True},
    "pipelining": lambda: {"pipelining": True},
    "async_output": lambda: {"async_output": True, "pipelining": True, "in_flight": 2},
    "pad_batch": lambda: {"hpu_graphs": insisting(), "pad_batch": True},
    EVERYTHING: lambda: {
        "hpu_graphs": insisting(),
        "async_copy": True,
        "pipelining": True,
        "async_output": True,
        "in_flight": 2,
    },
}
"""Flags, beside which all others are off. Graphs are not verified where they are alone: a wrong one shows."""
_REPEATED = ("async_copy", "pipelining", "async_output")
"""Techniques with which the device computes just what it does without them."""
_REMEDIES = {
    NONE: "Use nothing of the plugin for such a model: the device itself differs from the CPU.",
    "pad_batch": "Set no `pad_batch`.",
    "async_output": "Set no `async_output`.",
    EVERYTHING: "Set `hpu_graphs=False, async_copy=False, async_output=False, pipelining=False`.",
}
QUICK_MODELS = ("convolutional network", "encoder with a mask")
QUICK_TECHNIQUES = (NONE, "hpu_graphs", EVERYTHING)


def checks(*, quick: bool) -> Iterator[Check]:
    """A check per model and technique.

    Args:
        quick: Only two of the models, and three of the techniques.
    """
    for model in QUICK_MODELS if quick else CASES:
        for technique in QUICK_TECHNIQUES if quick else (NONE, *TECHNIQUES):
            run = partial(_compared_with_the_cpu, model) if technique == NONE else partial(_compared, model, technique)
            remedy = _REMEDIES.get(technique, f"Set `{technique}=False`.")
            yield Check(kind=Kind.TECHNIQUE, name=f"{model}, {technique}", run=run, turns_off=remedy)


def forget() -> None:
    """Forget predictions of other runs, as where the device has changed."""
    _on_the_cpu.cache_clear()
    _without.cache_clear()


def _predict(model: str, accelerator: Any) -> Run:
    case = CASES[model]
    return predict(accelerator, case.make(), case.batches(), precision=case.precision)


@cache
def _on_the_cpu(model: str) -> Any:
    return _predict(model, "cpu").predictions


@cache
def _without(model: str) -> tuple[Any, bool]:
    """Predictions of the device with all techniques off, and whether they are the same each time."""
    first, second = (_predict(model, ALL_OFF).predictions for _ in range(2))
    return first, distance(second, first, DEVICE_TOLERANCES, "the same run's before").equal


def _compared_with_the_cpu(model: str) -> Seen:
    predictions, repeatable = _without(model)
    away = distance(predictions, _on_the_cpu(model), CPU_TOLERANCES, "the CPU's")
    repeats = "" if repeatable else "; two runs differ in their last bits"
    return Seen(f"{away}, from the CPU's{repeats}", _figures(away) | {"repeatable": repeatable})


def _compared(model: str, technique: str) -> Seen:
    run = _predict(model, ALL_OFF | TECHNIQUES[technique]())
    expected, repeatable = _without(model)
    distance(run.predictions, _on_the_cpu(model), CPU_TOLERANCES, "the CPU's")
    away = distance(run.predictions, expected, DEVICE_TOLERANCES, "those without it,")
    if technique in _REPEATED and repeatable and not away.equal:
        raise Broken(f"{away}, although the device computes the same with and without it")
    if technique in _REPEATED:
        return Seen(str(away), _figures(away))
    return Seen(f"{away}; {check_graphs(run)}", _figures(away))


def _figures(away: Distance) -> dict[str, Any]:
    return {"equal": away.equal, "largest_difference": away.largest, "largest_value": away.scale}
