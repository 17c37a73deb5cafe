"""Checks of predictions hold on the emulator, and tell a device that goes wrong."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightning_hpu_infer.verify import changes, techniques, timing
from lightning_hpu_infer.verify.check import Broken, Check, NotTried, Result, Verdict
from lightning_hpu_infer.verify.child import run_check
from lightning_hpu_infer.verify.compare import DEVICE_TOLERANCES, distance
from lightning_hpu_infer.verify.models import CASES
from lightning_hpu_infer.verify.predict import ALL_OFF, check_graphs, predict
from tests.helpers import installed
from tests.verify.breaks import freeze, sources_are_lost, wraps_with


@pytest.fixture(autouse=True)
def fresh(fresh_dynamo: None) -> Iterator[None]:
    techniques.forget()
    yield
    techniques.forget()


CHECKS = {check.id: check for module in (techniques, changes) for check in module.checks(quick=False)}


def run(check: Check) -> Result:
    return run_check(check, "lazy")


def test_there_are_a_dozen_models_and_a_dozen_changes() -> None:
    assert len(CASES) >= 12
    assert len(changes.CHANGES) + len(changes.BATCHES) >= 12
    names = [f"technique: {model}, {name}" for model in CASES for name in ("all off", *techniques.TECHNIQUES)]
    assert [name for name in CHECKS if name.startswith("technique")] == names


@pytest.mark.parametrize("lazy", [True, pytest.param(False, marks=pytest.mark.full)], ids=["lazy", "eager"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "all on" in name else pytest.mark.full) for name in CHECKS]
)
def test_a_check_holds_on_the_emulator(name: str, lazy: bool) -> None:
    with installed(lazy=lazy):
        result = run(CHECKS[name])
    assert result.verdict == Verdict.HELD, result
    # Its kernels are the CPU's.
    assert result.figures["equal"] or "mixed precision" in name


@pytest.mark.parametrize(
    ("name", "break_"),
    [
        ("technique: multilayer perceptron, hpu_graphs", freeze),
        ("technique: state in a buffer, hpu_graphs", freeze),
        ("technique: multilayer perceptron, async_copy", sources_are_lost),
        ("change: a batch of another size", freeze),
        ("change: a weight in place", freeze),
    ],
)
def test_wrong_predictions_are_found(
    name: str, break_: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with installed(), monkeypatch.context() as patch:
        break_(patch)
        result = run(CHECKS[name])
    assert result.verdict == Verdict.BROKEN
    assert result.details == ""
    assert result.turns_off.startswith("Set ")


def test_a_graph_that_the_plugin_finds_wrong_itself_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(), monkeypatch.context() as patch:
        freeze(patch)
        result = run(CHECKS["technique: multilayer perceptron, all on"])
    assert result.verdict == Verdict.BROKEN
    assert "predictions are right, but" in result.seen
    assert "differs from the plain ops" in result.seen


def test_a_capture_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no memory")

    with installed(), monkeypatch.context() as patch:
        wraps_with(patch, lambda graph: fail)
        result = run(CHECKS["technique: multilayer perceptron, hpu_graphs"])
    assert result.verdict == Verdict.BROKEN
    assert "no memory" in result.seen


def test_without_a_graph_none_was_tried() -> None:
    case = CASES["multilayer perceptron"]
    with installed():
        found = predict(ALL_OFF, case.make(), case.batches())
    with pytest.raises(NotTried, match="predictions are right, but no graph ran"):
        check_graphs(found)


def test_timings_compare_predictions_first(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = timing.checks(quick=True)
    with installed():
        held = run(check)
    assert held.verdict == Verdict.HELD, held
    assert set(held.figures["speedup"]) == set(timing.ARMS) - {"all off"}
    each = held.figures["speedup"]["defaults"]
    assert 0 < each["least"] <= each["median"] <= each["most"]
    with installed(), monkeypatch.context() as patch:
        sources_are_lost(patch)
        assert run(check).verdict == Verdict.BROKEN


def test_distances() -> None:
    one = torch.tensor([1.0, 2.0, float("nan")])
    assert distance([one], [one.clone()], {}, "the").equal
    near = distance({"a": one * 1.0001}, {"a": one}, DEVICE_TOLERANCES, "the")
    assert not near.equal
    assert near.scale == 2.0
    for other in (one * 1.1, one[:2], one.double(), torch.tensor([1.0, 2.0, 3.0])):
        with pytest.raises(Broken):
            distance([other], [one], DEVICE_TOLERANCES, "the")
    with pytest.raises(Broken, match="1 tensors instead of the 2"):
        distance([one], [one, one], {}, "the")
    with pytest.raises(Broken):
        distance([torch.tensor([1, 2])], [torch.tensor([1, 3])], DEVICE_TOLERANCES, "the")
