"""Runs examples/first_run.ipynb and stores what it shows: on an idle machine, since it shows times.

`python docs/make_notebook.py` does it.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "first_run.ipynb"


def executed(folder: Path) -> nbformat.NotebookNode:
    """The notebook, run from its first cell to its last, with what its cells show. Its files go to a folder."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def rates(notebook: nbformat.NotebookNode) -> tuple[float, float]:
    """Batches per second in stock order, and with the defaults, as the notebook printed them."""
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output
    )
    stock, ours = re.findall(r"^(?:stock order|defaults): +(\d+) batches/s", printed, re.MULTILINE)
    return float(stock), float(ours)


def main() -> None:
    """Run and store it, if the defaults were faster than stock order."""
    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(Path(folder))
    stock, ours = rates(notebook)
    sys.stdout.write(f"stock order {stock:.0f} batches/s, the defaults {ours:.0f}\n")
    if ours <= stock:
        sys.exit("The defaults were not faster: nothing was stored. Run it on an idle machine.")
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
