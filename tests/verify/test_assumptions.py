"""Each question about the bridge is answered by the emulator, and tells a bridge that breaks the assumption."""

import pytest

from lightning_hpu_infer.verify.catalogue import assumptions
from lightning_hpu_infer.verify.check import MODES, Mode, Verdict
from lightning_hpu_infer.verify.child import run_check
from tests.helpers import installed
from tests.verify.breaks import BREAKS

ALL = {each.name: each for each in assumptions()}
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_every_assumption_is_broken_below() -> None:
    assert set(BREAKS) == set(ALL)
    assert len(ALL) >= 29


@pytest.mark.parametrize(("name", "mode"), [(each.name, mode) for mode in MODES for each in assumptions(mode)])
def test_the_emulator_keeps_an_assumption(name: str, mode: Mode) -> None:
    with installed(lazy=mode == "lazy"):
        result = run_check(ALL[name].check(), mode)
    assert (result.verdict, result.turns_off, result.details) == (Verdict.HELD, "", ""), result.seen
    assert result.seen


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_assumption_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, break_ = BREAKS[name]
    with installed(lazy=mode == "lazy"), monkeypatch.context() as patch:
        break_(patch)
        result = run_check(ALL[name].check(), mode)
    assert result.verdict == Verdict.BROKEN
    assert result.details == "", "found by chance, through an error that nobody expected"
    assert result.turns_off == f"Set {ALL[name].turns_off}."
