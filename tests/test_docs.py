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


def test_only_one_module_imports_habana_frameworks() -> None:
    package = ROOT / "lightning_hpu_infer"
    importing = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "emulator" not in path.parts
        and re.search(r"^\s*(import|from) habana_frameworks", path.read_text(), re.MULTILINE)
    }
    assert importing == {"_habana.py"}


# Who may be imported by whom: each module, or package as a whole, only from those before it.
ORDER = [
    {"_habana", "_torch", "shapes", "trace"},
    {"config", "fetch", "gaps", "grouping", "prefetch", "report", "transfer", "tuning"},
    {"advice", "buckets", "chrome", "graphs", "hooks", "plots", "reorder", "render"},
    {"analysis", "doctor"},
    {"pipeline", "tracing", "diagnose"},
    {"loop", "cli"},
    {"accelerator", "__main__"},
    {"strategies"},
]


def modules_of(folder: Path, name: str) -> dict[str, set[str]]:
    """What each module or package in a folder imports of its neighbours, by `import` at the top of a file."""
    found: dict[str, set[str]] = {}
    for path in folder.glob("*"):
        files = [path] if path.suffix == ".py" else [*path.rglob("*.py")]
        if files and path.stem not in ("__init__", "emulator"):
            lines = [line for file in files for line in file.read_text().splitlines()]
            froms = (re.match(rf"from {re.escape(name)}(?:\.(\w+)[\w.]*)? import (.*)", line) for line in lines)
            found[path.stem] = {
                each
                for match in froms
                if match
                for each in ([match[1]] if match[1] else [part.split()[0] for part in match[2].split(",")])
            } - {path.stem}
    return found


def test_imports_point_one_way() -> None:
    modules = modules_of(ROOT / "lightning_hpu_infer", "lightning_hpu_infer")
    assert set().union(*ORDER) == set(modules)
    for level, names in enumerate(ORDER):
        earlier = set().union(*ORDER[:level]) | {"emulator"}
        for name in names:
            assert modules[name] <= earlier, name


def test_imports_inside_of_a_package_make_no_circle() -> None:
    modules = modules_of(ROOT / "lightning_hpu_infer" / "graphs", "lightning_hpu_infer.graphs")
    assert len(modules) > 8
    assert sum(len(imported) for imported in modules.values()) > 8
    done: set[str] = set()
    while ready := {name for name, imported in modules.items() if imported <= done} - done:
        done |= ready
    assert set(modules) - done == set()


def test_the_emulator_imports_nothing_from_its_parent() -> None:
    for path in (ROOT / "lightning_hpu_infer" / "emulator").rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (lightning_hpu_infer[\w.]*)", path.read_text(), re.MULTILINE):
            assert module.startswith("lightning_hpu_infer.emulator"), (path, module)


def test_every_test_that_the_parity_table_names_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "parity.md").read_text())
    assert len(named) > 30
    for file, function in named:
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), (file, function)
