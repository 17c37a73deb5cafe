"""Whether `trainer.predict` would run on an HPU here, and what to do where it would not."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, metadata
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from lightning_hpu_infer import recipes
from lightning_hpu_infer.facts import Facts, gather_facts
from lightning_hpu_infer.recipes import FolderState

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Diagnosis", "Facts", "Finding", "Level", "examine", "gather_facts"]

_PACKAGE = "lightning-hpu-infer"
_COMPROMISED = ("2.6.2", "2.6.3")
_LAST_FOR_HABANA = "2.5.5"
_FOUR_FIELDS_FROM = "1.20"  # of the bridge, at the earliest
_EMULATE = "emulate one: LIGHTNING_HPU_INFER_EMULATOR=1 in the environment (PyTorch 2.10 or newer)"


class Level(str, Enum):
    """What a finding means for `trainer.predict`."""

    OK = "ok"
    ADVICE = "advice"
    """It runs well, and there is something to try."""
    WARNING = "warning"
    """It runs, but not as it might."""
    ERROR = "error"
    """It does not run on an HPU."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings. Prints itself with `rich.print(diagnosis)`."""

    facts: Facts
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether predict would run on an HPU, a real or an emulated one."""
        return all(finding.level != Level.ERROR for finding in self.findings)

    def to_json(self) -> str:
        """Facts and findings as JSON."""
        fields = asdict(self, dict_factory=lambda items: {name: _plain(value) for name, value in items})
        return json.dumps({"healthy": self.healthy} | fields, indent=2)

    def __rich__(self) -> "RenderableType":
        return _render(self)


def examine(facts: Facts) -> Diagnosis:
    """What works together, what does not, and the remedies."""
    checks = (
        _check_compromised,
        _check_versions,
        _check_lightning_habana,
        _check_bridge,
        _check_mode,
        _check_graphs,
        _check_recipes,
        _check_compile_only,
    )
    return Diagnosis(facts, tuple(finding for check in checks for finding in check(facts)))


def _check_compromised(facts: Facts) -> Iterator[Finding]:
    if facts.lightning in _COMPROMISED:
        text = f"Lightning {facts.lightning} was a compromised release. Treat this machine's credentials as leaked."
        yield Finding(Level.ERROR, text, "Install another: pip install 'lightning==2.6.6'")


def _check_versions(facts: Facts) -> Iterator[Finding]:
    bounds = _bounds()
    if bounds is None:
        text = f"{_PACKAGE} is importable, but not installed: which versions it supports is not known."
        yield Finding(Level.WARNING, text, "Install it, where its sources are: pip install .")
        return
    python, torch, lightning = (bounds[name] for name in ("python", "torch", "lightning"))
    yield _check_version("Python", facts.python, python, f"Use Python {python}")
    remedy = f"Use a newer Gaudi image; without a Gaudi: pip install 'torch{torch}'"
    yield _check_version("PyTorch", facts.torch, torch, remedy)
    if facts.lightning not in _COMPROMISED:
        remedy = f"Install one that is: pip install 'lightning{lightning}'"
        yield _check_version("Lightning", facts.lightning, lightning, remedy)


def _check_version(name: str, found: str | None, bounds: SpecifierSet, remedy: str) -> Finding:
    if found is None:
        return Finding(Level.ERROR, f"{name} is not installed.", remedy)
    try:
        # The release alone: Habana's torch 2.4.0a0+git74cd574 is its build of 2.4.0, no alpha.
        supported = Version(found).base_version in bounds
    except InvalidVersion:
        supported = False
    if not supported:
        return Finding(Level.ERROR, f"{name} {found} is not supported.", remedy)
    return Finding(Level.OK, f"{name} {found} is supported.")


def _bounds() -> dict[str, SpecifierSet] | None:
    """What the installed package demands: its bounds are written in setup.cfg, and nowhere else."""
    try:
        package = metadata(_PACKAGE)
    except PackageNotFoundError:
        return None
    requirements = map(Requirement, package.get_all("Requires-Dist", []))
    bounds = {requirement.name: requirement.specifier for requirement in requirements if requirement.marker is None}
    return bounds | {"python": SpecifierSet(package["Requires-Python"])}


def _check_lightning_habana(facts: Facts) -> Iterator[Finding]:
    if facts.lightning_habana is None or facts.lightning is None:
        return
    if _is_at_most(facts.lightning, _LAST_FOR_HABANA):
        yield Finding(Level.OK, f"lightning-habana {facts.lightning_habana} works with Lightning {facts.lightning}.")
        return
    yield Finding(
        Level.WARNING,
        f"lightning-habana {facts.lightning_habana} cannot be imported beside Lightning {facts.lightning}. Prediction"
        " does not need it; only its precision plugin and strategies are missing.",
        f"If you need them: pip install 'lightning=={_LAST_FOR_HABANA}'. If not: pip uninstall lightning-habana",
    )


def _check_bridge(facts: Facts) -> Iterator[Finding]:
    lazy = facts.environment.get("PT_HPU_LAZY_MODE")
    if facts.bridge is None:
        yield Finding(
            Level.ERROR,
            "Habana's PyTorch bridge (`habana_frameworks`) is not installed: predict runs on the CPU.",
            f"On a Gaudi, use the torch and habana_frameworks of its image. Without one, {_EMULATE}",
        )
    elif facts.error and lazy != "0" and not _is_fork(facts.torch):
        yield Finding(
            Level.ERROR,
            f"The bridge does not work ({facts.error}). It refuses stock PyTorch in lazy mode, and torch {facts.torch}"
            " looks like it.",
            "Use the torch of your Gaudi image, or set PT_HPU_LAZY_MODE=0",
        )
    elif facts.error:
        yield Finding(
            Level.ERROR,
            f"The bridge does not work ({facts.error}).",
            f"Its version ({facts.bridge}) must fit torch {facts.torch} and the driver: compare with `hl-smi`",
        )
    elif not facts.device_count:
        yield Finding(
            Level.ERROR,
            f"The bridge {facts.bridge} is installed, but finds no device: predict runs on the CPU.",
            "Check `hl-smi`, HABANA_VISIBLE_DEVICES and HABANA_VISIBLE_MODULES, that no other process has the device,"
            f" and `--runtime=habana` in a container. Or {_EMULATE}",
        )
    else:
        kind = "an emulated HPU (figures measured on it are not a Gaudi's)" if facts.emulated else "an HPU"
        name = f", {facts.device_name}" if facts.device_name else ""
        yield Finding(Level.OK, f"predict runs on {kind}: {facts.device_count} found{name}.")


def _check_mode(facts: Facts) -> Iterator[Finding]:
    mode = facts.environment.get("PT_HPU_LAZY_MODE", "1")
    if mode not in ("0", "1"):
        yield Finding(
            Level.WARNING,
            # Its `is_lazy()` asks whether it is not 0; autoloading and `ModuleCacher` ask whether it is 1.
            f"PT_HPU_LAZY_MODE={mode} is neither 0 nor 1: parts of the bridge take it for lazy mode, others do not.",
            "Set it to 1 for lazy mode, the one with HPU graphs, or to 0 for eager mode",
        )


def _check_graphs(facts: Facts) -> Iterator[Finding]:
    if facts.lazy is None:
        return
    cache = facts.environment.get("PT_HPUGRAPH_DISABLE_TENSOR_CACHE", "1")
    # Intel's list of runtime variables has the default 1 for 1.19, and 0 for its current release.
    unset = "" if "PT_HPU_LAZY_MODE" in facts.environment else " PT_HPU_LAZY_MODE is unset: its release decides."
    if not facts.lazy:
        yield Finding(
            Level.ADVICE,
            "The bridge is in eager mode, Intel's default: `hpu_graphs=True` compiles the step with `hpu_backend`. HPU"
            f" graphs exist in lazy mode only, which Intel no longer develops.{unset}",
            "Measure both: set PT_HPU_LAZY_MODE=1 before Python starts",
        )
    elif cache != "1":
        yield Finding(
            Level.ERROR,
            f"PT_HPUGRAPH_DISABLE_TENSOR_CACHE={cache} would let graphs overwrite your batches: nothing is captured.",
            "Unset it, or pass `hpu_graphs=False`",
        )
    else:
        text = "The bridge is in lazy mode: `hpu_graphs=True` captures HPU graphs. Intel no longer develops this mode."
        yield Finding(Level.OK, text + unset)


def _check_recipes(facts: Facts) -> Iterator[Finding]:
    value = facts.environment.get(recipes.VARIABLE, "")
    try:
        cache = recipes.parse(value)
    except ValueError as error:
        yield Finding(Level.ERROR, f"{recipes.VARIABLE}={value} ends the bridge: {error}.", recipes.FORMAT)
        return
    if cache.fields > 3 and facts.bridge and not facts.emulated and _is_before(facts.bridge, _FOUR_FIELDS_FROM):
        text = f"{recipes.VARIABLE}={value} ends the bridge: {facts.bridge} takes three fields at most."
        yield Finding(Level.ERROR, text, "Leave out the fourth field, NFS")
    if not cache.folder:
        if facts.device_count and not facts.emulated:
            text = "Compiled recipes are not kept: every process compiles every shape anew."
            yield Finding(Level.ADVICE, text, f"To keep them on a local disk: {recipes.FORMAT}")
    elif facts.recipe_folder == FolderState.IMPOSSIBLE:
        text = f"{recipes.VARIABLE} names {cache.folder}, which is no folder and cannot be made."
        yield Finding(Level.ERROR, text, "Name a folder that can be written to, on a local disk")
    elif facts.recipe_folder == FolderState.READ_ONLY:
        text = f"{recipes.VARIABLE} names {cache.folder}, which cannot be written to: no new recipe is kept."
        yield Finding(Level.WARNING, text, "Name a folder that can be written to, on a local disk")
    elif cache.delete:
        text = f"{recipes.VARIABLE} empties {cache.folder} when a process starts: no recipe is used again."
        yield Finding(Level.ADVICE, text, "Set its second field to false")
    else:
        # As vllm-gaudi does in its warm-up.
        text = f"Compiled recipes are kept in {cache.folder}; a run with PT_COMPILE_ONLY_MODE=true only compiles them."
        yield Finding(Level.OK, text)


def _check_compile_only(facts: Facts) -> Iterator[Finding]:
    if facts.environment.get("PT_COMPILE_ONLY_MODE", "").lower() in ("1", "true"):
        yield Finding(
            Level.ERROR,
            "PT_COMPILE_ONLY_MODE is on: the bridge compiles, but launches nothing, and predictions are garbage.",
            f"Unset it. To fill the recipe cache ({recipes.VARIABLE}), run once with it and with `verify_graphs=0`, and"
            " throw the predictions away",
        )


def _is_at_most(found: str, last: str) -> bool:
    try:
        return Version(found) <= Version(last)
    except InvalidVersion:
        return False


def _is_before(found: str, first: str) -> bool:
    try:
        return Version(found) < Version(first)
    except InvalidVersion:
        return False


def _is_fork(torch_version: str) -> bool:
    """Habana's builds say so in their local version, such as 2.5.1a0+git1234abc and 2.6.0+hpu_1.20.0."""
    local = torch_version.partition("+")[2]
    return local.startswith(("git", "hpu"))


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


_MARKS = {
    Level.OK: ("✓", "green"),
    Level.ADVICE: ("i", "blue"),
    Level.WARNING: ("!", "yellow"),
    Level.ERROR: ("✗", "red"),
}


def _render(diagnosis: Diagnosis) -> "RenderableType":
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    facts = diagnosis.facts
    installed: dict[str, Any] = {
        "python": facts.python,
        "torch": facts.torch,
        "lightning": facts.lightning,
        "lightning-habana": facts.lightning_habana,
        "habana_frameworks": "emulated" if facts.emulated else facts.bridge,
        "mode": None if facts.lazy is None else "lazy" if facts.lazy else "eager",
        **facts.environment,
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in installed.items():
        table.add_row(name, Text("-" if value is None else str(value)))
    findings = Table(box=None, show_header=False, pad_edge=False)
    for finding in diagnosis.findings:
        mark, colour = _MARKS[finding.level]
        findings.add_row(Text(mark, style=f"bold {colour}"), Text(finding.text))
        if finding.remedy:
            findings.add_row("", Text(f"→ {finding.remedy}", style=colour))
    if diagnosis.healthy:
        device = "an emulated HPU" if facts.emulated else "an HPU"
        title, colour = f"trainer.predict would run on {device}", "green"
    else:
        title, colour = "trainer.predict would not run on an HPU", "red"
    return Panel(
        Group(table, Text(), findings),
        title=Text(title, style=f"bold {colour}"),
        subtitle=Text("for a bug report: python -m lightning_hpu_infer doctor --json"),
        expand=False,
    )
