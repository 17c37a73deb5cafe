"""The house: who may import whom, one job per file, and names of other projects in one file each."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_hpu_infer

PACKAGE = Path(lightning_hpu_infer.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "bridge" not in path.parts)
MAX_LINES = 400

# A module imports only from the lines above its own. A package stands for all of its modules that are not listed.
LAYERS = [
    {"bytecode", "links", "nested", "observer", "randomness"},
    {"held"},
    {"_dynamo"},
    {"_habana", "_lightning", "_torch", "kinds", "shared"},
    {"ahead", "arrays", "lengths.pad", "ownership", "recipes"},
    {"config", "devices", "facts", "late"},
    {"lengths", "prefetch", "transfer", "tuning", "workers"},
    {"batch", "graphs", "in_flight", "observe", "postprocess", "work", "writing"},
    {"hooks", "samples", "streaming", "step", "source", "doctor"},
    {"model_step", "prepare", "writing.callback", "writing.fingerprint", "writing.session"},
    {"engine"},
    {"pipeline"},
    {"loop", "integrations"},
    {"accelerator"},
    {"strategies", "verify"},
    {"cli"},
    {"__main__"},
]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, anywhere in it, for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                if module in MODULES:
                    yield module
                elif node.module in MODULES:
                    yield node.module


IMPORTS = {name: {other for other in imported(path) if other != name} for name, path in MODULES.items()}


def layer_of(module: str) -> int:
    """Its line above: that of the module itself, or else of its package."""
    name = module.removeprefix("lightning_hpu_infer.")
    found = [number for number, names in enumerate(LAYERS) if name in names]
    return found[0] if found else next(n for n, names in enumerate(LAYERS) if name.split(".")[0] in names)


PLACED = [name for name in MODULES if not name.startswith("lightning_hpu_infer.emulator") and "." in name]


def test_every_module_has_a_layer_and_every_layer_has_modules() -> None:
    assert len(PLACED) > 30
    assert {layer_of(name) for name in PLACED} == set(range(len(LAYERS)))


@pytest.mark.parametrize("module", PLACED)
def test_imports_point_one_way(module: str) -> None:
    package = module.split(".")[1]
    for other in IMPORTS[module]:
        if other.startswith("lightning_hpu_infer.emulator"):
            assert module == "lightning_hpu_infer._habana", f"{module} imports {other}"
            continue
        same_package = other.split(".")[1:2] == [package]
        assert layer_of(other) < layer_of(module) or (same_package and layer_of(other) == layer_of(module)), other


def test_there_is_no_circle_of_imports() -> None:
    done: set[str] = set()
    while ready := {name for name, others in IMPORTS.items() if others <= done} - done:
        done |= ready
    assert set(MODULES) - done == set()


def test_only_the_loop_the_engine_and_the_command_line_record_runs() -> None:
    importing = {name for name, others in IMPORTS.items() if "lightning_hpu_infer.observe.run" in others}
    assert importing <= {f"lightning_hpu_infer.{name}" for name in ("loop", "engine", "cli")}


def test_the_emulator_imports_nothing_from_its_parent() -> None:
    for name, others in IMPORTS.items():
        if name.startswith("lightning_hpu_infer.emulator"):
            assert [other for other in others if not other.startswith("lightning_hpu_infer.emulator")] == []


def test_only_one_module_imports_habana_frameworks() -> None:
    importing = [
        name for name, path in MODULES.items() if re.search(r"^\s*(import|from) habana_", path.read_text(), re.M)
    ]
    assert [name for name in importing if ".emulator" not in name] == ["lightning_hpu_infer._habana"]


@pytest.mark.parametrize(("library", "homes"), [("lightning", ["_lightning"]), ("torch", ["_dynamo", "_torch"])])
def test_private_names_are_imported_in_few_modules(library: str, homes: list[str]) -> None:
    private = re.compile(
        rf"^ *(from {library}(\.\w+)* import [^#\n]*\b_[a-zA-Z]|(from|import) {library}(\.\w+)*\._\w)", re.MULTILINE
    )
    importing = {name for name, path in MODULES.items() if private.search(path.read_text())}
    assert {name for name in importing if ".emulator" not in name} == {f"lightning_hpu_infer.{home}" for home in homes}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(PACKAGE)) for path in FILES])
def test_a_files_first_line_names_its_job(path: Path) -> None:
    text = path.read_text()
    if path.name == "__main__.py":
        return
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    assert docstring.splitlines()[0].endswith((".", ":")), docstring


@pytest.mark.parametrize(
    "path", [*FILES, *sorted(Path(__file__).parent.rglob("*.py"))], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_no_file_is_longer_than_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_what_watches_a_run_is_smaller_than_what_it_watches() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (PACKAGE / "observe").glob("*.py"))
    assert lines <= 1450


def test_words_are_the_fields() -> None:
    """Words that an earlier version had for clone, set_depth, over capacity, install_on and the like."""
    private = re.compile(
        r"how-manieth|\bbeliev|\bdistrust|\bdeepen|take_over|overdue|put[_ ]back|\bfor ever\b|does without it|pulls_ba",
        re.IGNORECASE,
    )
    root = PACKAGE.parent
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("examples/*.py"), *root.glob("benchmarks/*.py")]
    found = {path.name: private.findall(path.read_text()) for path in [*FILES, *pages]}
    assert {name: words for name, words in found.items() if words} == {}
