"""The notebook runs from the first cell to the last, and shows a report and a picture."""

import os
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

from tests.helpers import script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def make_notebook() -> ModuleType:
    return script(ROOT / "docs" / "make_notebook.py")


@pytest.fixture
def stored() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "examples" / "first_run.ipynb", as_version=4)


def shown(cells: list[nbformat.NotebookNode]) -> list[set[str]]:
    """What kinds of output each code cell has."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    return [{kind for output in cell.outputs for kind in output.get("data", {})} for cell in code]


def test_the_notebook_runs_and_shows_what_is_stored(
    make_notebook: ModuleType, stored: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # which it changes
    fresh = make_notebook.executed(tmp_path)
    assert shown(fresh.cells) == shown(stored.cells)
    kinds = set[str]().union(*shown(fresh.cells))
    assert {"text/html", "image/png"} <= kinds


def test_what_is_stored_is_not_slower_with_the_plugin(make_notebook: ModuleType, stored: nbformat.NotebookNode) -> None:
    stock, ours = make_notebook.rates(stored)
    assert ours > stock


def test_stored_outputs_have_no_path_of_a_machine(stored: nbformat.NotebookNode) -> None:
    texts = [str(cell.get("outputs", "")) for cell in stored.cells]
    assert [text for text in texts if "/tmp/" in text or "/home/" in text or "/root/" in text] == []
