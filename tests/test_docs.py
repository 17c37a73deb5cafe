"""What the documents say is so: their Python runs, and the changelog knows the version."""

import re
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

import lightning_hpu_infer
from lightning_hpu_infer import emulator
from tests.helpers import Net, rows

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.name
)
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a Trainer writes its logs where it is
    names = {"model": Net(), "dataloader": rows(), "Trainer": Trainer}
    try:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(block, str(page), "exec"), names)
    finally:
        emulator.uninstall()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_newest_version_in_the_changelog_is_the_packages() -> None:
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == lightning_hpu_infer.__version__


def test_exports_are_sorted_and_exist() -> None:
    names = lightning_hpu_infer.__all__
    assert names == sorted(names)
    assert [name for name in names if not hasattr(lightning_hpu_infer, name)] == []


def test_no_fact_stands_in_both_setup_cfg_and_pyproject() -> None:
    assert "[project]" not in (ROOT / "pyproject.toml").read_text()


def test_every_test_that_the_parity_table_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "parity.md").read_text())
    assert len(named) > 30
    for file, function in named:
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), (file, function)
