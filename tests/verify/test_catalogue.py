"""All checks are named, described, and found by their names."""

from pathlib import Path

import pytest

from lightning_hpu_infer.verify.catalogue import assumptions, check_patterns, checks, is_chosen
from lightning_hpu_infer.verify.check import MODES, Kind, Mode
from tests.helpers import script

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mode", MODES)
def test_ids_are_unique_and_quick_ones_are_among_all(mode: Mode) -> None:
    ids = [check.id for check in checks(mode)]
    quick = [check.id for check in checks(mode, quick=True)]
    assert len(set(ids)) == len(ids)
    assert set(quick) < set(ids)
    assert {each for each in set(ids) - set(quick) if each.startswith(Kind.ASSUMPTION)} == set()
    assert all(check.turns_off for check in checks(mode))


def test_each_assumption_is_one_sentence_with_a_source() -> None:
    for each in assumptions():
        assert each.statement.endswith("."), each.name
        assert "bridge 1.19" in each.source or "PyTorch" in each.source, each.name
        assert each.modes


def test_only_those_that_are_asked_for_run() -> None:
    assert {check.kind for check in checks("lazy", only=["change"])} == {Kind.CHANGE}
    assert [check.name for check in checks("lazy", only=["weight in*"])] == ["a weight in place"]
    assert is_chosen("anything", [])
    with pytest.raises(ValueError, match="no check is called 'wrong'"):
        check_patterns(["change", "wrong"])


def test_the_page_has_the_assumptions() -> None:
    """`make options` writes them."""
    page = ROOT / "docs" / "verify.md"
    assert script(page.with_name("make_assumptions.py")).page(page.read_text()) == page.read_text()
