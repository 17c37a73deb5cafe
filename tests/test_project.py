"""What contributors rely on: the map of the house, the names of make targets, versions, and docstrings of classes."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import lightning_hpu_infer
from tests.helpers import script

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_hpu_infer"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MAP = CONTRIBUTING.partition("<!-- map:")[2].partition("<!-- end of map -->")[0]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
TARGETS = set(re.findall(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split())


def load(path: Path) -> Any:
    # `on` is a boolean in YAML 1.1, and a string to GitHub.
    return yaml.load(path.read_text(), yaml.BaseLoader)


def modules() -> set[str]:
    """Every module but the names of the bridge, and packages that say nothing of their own."""
    paths = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    return {path.as_posix() for path in paths if "bridge" not in path.parts and path.as_posix().count("__init__") == 0}


def test_the_map_names_every_module_and_no_other() -> None:
    named = re.findall(r"^\| `([\w/]+\.py)` \|", MAP, re.MULTILINE)
    assert sorted(named) == sorted(set(named))
    assert modules() - set(named) == set()
    assert set(named) - modules() - {"__init__.py"} == set()


def test_every_package_has_a_table_in_the_map() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == set(re.findall(r"^`(\w+)/`:", MAP, re.MULTILINE))


def test_files_that_contributing_names_exist() -> None:
    named = re.findall(r"`([\w./]+/[\w.]+\.\w+|[\w.]+\.(?:py|md|cfg|toml|txt|cff))`", CONTRIBUTING)
    assert len(named) > 60
    lost = [name for name in named if not ((ROOT / name).exists() or (PACKAGE / name).exists())]
    assert [name for name in lost if name not in ("report.json", "trace.json")] == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", ".github/pull_request_template.md"])
def test_make_targets_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`make ([\w-]+)", (ROOT / page).read_text()) + re.findall(
        r"^make ([\w-]+)", (ROOT / page).read_text(), re.MULTILINE
    )
    assert named
    assert set(named) - TARGETS == set()


def test_every_make_target_has_a_rule_and_is_described() -> None:
    makefile = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([\w -]+):(?!=)", makefile, re.MULTILINE)
    assert {target for rule in rules for target in rule.split()} == TARGETS
    assert {target for target in TARGETS if f"make {target}" not in f"{CONTRIBUTING}\n{makefile}"} <= {"clean"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_make_targets_only(path: Path) -> None:
    workflow = load(path)
    assert {"name", "on", "jobs", "permissions"} <= set(workflow)
    for job in workflow["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        assert "timeout-minutes" in job
        for command in (step["run"] for step in job["steps"] if "run" in step):
            called = re.match(r"make (\$\{\{ matrix\.target \}\}|[\w-]+)(?= |$)", command)
            assert called is not None, command
            targets = {entry["target"] for entry in matrix} if "matrix" in called[1] else {called[1]}
            assert targets <= TARGETS, command


def test_workflows_cover_every_supported_version() -> None:
    include = load(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    setup = (ROOT / "setup.cfg").read_text()
    pythons = set(re.findall(r"Programming Language :: Python :: (3\.\d+)", setup))
    assert {entry["python"] for entry in include} == pythons
    assert {entry["lightning"] for entry in include} == {"2.4", "2.5", "2.6"}
    assert {entry["torch"] for entry in include} == {"current", "2.6"}
    assert "torch>=2.6\n" in setup
    assert "lightning>=2.4,<2.7" in setup


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms(path: Path) -> None:
    form = load(path)
    if path.name == "config.yml":
        assert form["blank_issues_enabled"] == "false"
        return
    assert {"name", "description", "body"} <= set(form)
    names = [field["id"] for field in form["body"]]
    assert len(names) == len(set(names))
    assert path.name != "bug.yml" or "python -m lightning_hpu_infer doctor --json" in path.read_text()


def test_the_citation_has_the_packages_version() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["version"] == lightning_hpu_infer.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)


@pytest.fixture(scope="module")
def release_check() -> ModuleType:
    return script(ROOT / ".ci" / "release_check.py")


def test_files_agree_on_the_version(release_check: ModuleType) -> None:
    assert set(release_check.versions().values()) == {lightning_hpu_infer.__version__}


def test_a_release_by_another_tag_is_refused(release_check: ModuleType) -> None:
    version = lightning_hpu_infer.__version__
    assert [problem for problem in release_check.problems(f"v{version}") if "Unreleased" not in problem] == []
    assert "a release's tag begins with v" in release_check.problems(version)
    assert f"CITATION.cff says {version}" in release_check.problems("v99.0.0")
    script = [sys.executable, str(ROOT / ".ci" / "release_check.py"), "v99.0.0"]
    refused = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "No release by the tag 'v99.0.0'" in refused.stderr


def documented_classes() -> Iterator[tuple[Path, ast.ClassDef, list[str]]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            docstring = ast.get_docstring(node) if isinstance(node, ast.ClassDef) else None
            if isinstance(node, ast.ClassDef) and docstring and "\nArgs:\n" in docstring:
                section = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
                yield path, node, re.findall(r"^    (\*{0,2}\w+)(?: \(.*\))?:", section, re.MULTILINE)


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][1:]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def test_docstrings_of_classes_describe_the_arguments_of_init() -> None:
    """Ruff compares docstrings of functions only."""
    compared = 0
    for path, node, described in documented_classes():
        for function in node.body:
            if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                compared += 1
                taken = [name.lstrip("*") for name in parameters(function)]
                assert [name.lstrip("*") for name in described] == taken, f"{path.name}: {node.name}"
    assert compared > 15


@pytest.mark.parametrize("folder", ["lightning_hpu_infer", "model_zoo", "benchmarks", "examples"])
def test_only_tests_import_tests(folder: str) -> None:
    """What both use stands elsewhere, such as the networks in `model_zoo/`."""
    paths = list((ROOT / folder).rglob("*.py"))
    assert paths
    importing = [path.name for path in paths if re.search(r"^\s*(from|import) tests\b", path.read_text(), re.MULTILINE)]
    assert importing == []


def test_what_the_page_about_tests_names_exists() -> None:
    tests = ROOT / "tests"
    page, conftests = (
        (tests / "README.md").read_text(),
        "".join(each.read_text() for each in tests.rglob("conftest.py")),
    )
    files = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py|(?:[a-z_]+/)+)`", page)
    assert len(files) > 30
    # In a folder's row, files are those of that folder.
    places = [tests, ROOT, *(each for each in tests.iterdir() if each.is_dir())]
    lost = [name for name in files if not any((place / name).exists() for place in places)]
    assert [name for name in lost if not name.endswith(("/x.py", "_x.py"))] == []  # x stands for any name
    table = page.partition("## Fixtures")[2].partition("## Laws")[0]
    fixtures = re.findall(r"^\| `([\w`, ]+)` \|", table, re.MULTILINE)
    assert len(fixtures) > 6
    for name in ", ".join(fixtures).replace("`", "").split(", "):
        assert f"def {name}(" in conftests, name
    folders = {each.parent.name for each in tests.glob("*/__init__.py")}
    assert [name for name in folders if f"\n| `{name}/` |" not in page] == []


def test_no_test_imports_from_a_file_of_tests() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert not re.search(r"^\s*from tests\.(\w+\.)?test_", path.read_text(), re.MULTILINE), path
