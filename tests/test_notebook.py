"""The notebook runs from the first cell to the last, and shows a report and a picture."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_run.ipynb"


def shown(cells: list[nbformat.NotebookNode]) -> list[set[str]]:
    """What kinds of output each code cell has."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    return [{kind for output in cell.outputs for kind in output.get("data", {})} for cell in code]


def test_the_notebook_runs_and_shows_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernel is another process, with the Lightning of this one.
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]), prepend=os.pathsep)
    stored = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(fresh, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shown(fresh.cells) == shown(stored.cells)
    kinds = set[str]().union(*shown(fresh.cells))
    assert {"text/html", "image/png"} <= kinds


def test_stored_outputs_have_no_path_of_a_machine() -> None:
    stored = nbformat.read(NOTEBOOK, as_version=4)
    texts = [str(cell.get("outputs", "")) for cell in stored.cells]
    assert [text for text in texts if "/tmp/" in text or "/home/" in text or "/root/" in text] == []
