"""Whether `trainer.predict` would run on an HPU here, and what to do where it would not."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib.metadata import PackageNotFoundError, metadata, version
from typing import TYPE_CHECKING, Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from lightning_hpu_infer import _habana

if TYPE_CHECKING:
    from rich.console import RenderableType

_PREFIXES = ("PT_HPU_", "PT_HPUGRAPH_", "HABANA_", "LIGHTNING_HPU_INFER_")
_PACKAGE = "lightning-hpu-infer"
_COMPROMISED = ("2.6.2", "2.6.3")
_LAST_FOR_HABANA = "2.5.5"
_EMULATE = "emulate one: LIGHTNING_HPU_INFER_EMULATOR=1 in the environment (PyTorch 2.10 or newer)"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is installed here. Versions are None where a package is not."""

    python: str
    torch: str
    lightning: str | None
    lightning_habana: str | None = None
    bridge: str | None = None
    """Version of `habana_frameworks`; "unknown" if it does not say."""
    emulated: bool = False
    """The bridge is the emulator's."""
    error: str = ""
    """What the bridge raised when it was asked for devices."""
    device_count: int = 0
    device_name: str = ""
    lazy: bool | None = None
    """The bridge's mode, if there is a bridge that works."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of Habana's and ours."""


class Level(str, Enum):
    """What a finding means for `trainer.predict`."""

    OK = "ok"
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


def gather_facts() -> Facts:
    """Look at this process. Asks the bridge for its devices, which may open one."""
    bridge = _bridge_version() if _habana.is_installed() else None
    count, name, lazy, error = 0, "", None, ""
    emulated = False
    if bridge is not None:
        try:
            emulated = _habana.is_emulated()
            if _habana.is_available():
                count, name = _habana.device_count(), _device_name()
            lazy = _habana.is_lazy()
        except Exception as problem:  # whatever a half-installed bridge raises is a finding
            error = f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
    return Facts(
        python="{}.{}.{}".format(*sys.version_info),
        torch=torch.__version__,
        lightning=_version("lightning"),
        lightning_habana=_version("lightning-habana"),
        bridge=bridge,
        emulated=emulated,
        error=error,
        device_count=count,
        device_name=name,
        lazy=lazy,
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)},
    )


def examine(facts: Facts) -> Diagnosis:
    """What works together, what does not, and the remedies."""
    checks = (
        _check_compromised,
        _check_versions,
        _check_lightning_habana,
        _check_bridge,
        _check_mode,
        _check_graphs,
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
    if not facts.lazy:
        yield Finding(
            Level.WARNING,
            "The bridge is in eager mode: there are no HPU graphs, `hpu_graphs=True` compiles the step with"
            " `hpu_backend`.",
            "For HPU graphs set PT_HPU_LAZY_MODE=1 before Python starts",
        )
    elif cache != "1":
        yield Finding(
            Level.ERROR,
            f"PT_HPUGRAPH_DISABLE_TENSOR_CACHE={cache} would let graphs overwrite your batches: nothing is captured.",
            "Unset it, or pass `hpu_graphs=False`",
        )
    else:
        yield Finding(Level.OK, "The bridge is in lazy mode: `hpu_graphs=True` captures HPU graphs.")


def _is_at_most(found: str, last: str) -> bool:
    try:
        return Version(found) <= Version(last)
    except InvalidVersion:
        return False


def _is_fork(torch_version: str) -> bool:
    """Habana's builds say so in their local version, such as 2.5.1a0+git1234abc and 2.6.0+hpu_1.20.0."""
    local = torch_version.partition("+")[2]
    return local.startswith(("git", "hpu"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _bridge_version() -> str:
    return _version("habana-torch-plugin") or "unknown"


def _device_name() -> str:
    try:
        return str(torch.get_device_module(_habana.DEVICE_TYPE).get_device_name())
    except (AttributeError, RuntimeError):
        return ""


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value


_MARKS = {Level.OK: ("✓", "green"), Level.WARNING: ("!", "yellow"), Level.ERROR: ("✗", "red")}


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
    return Panel(Group(table, Text(), findings), title=Text(title, style=f"bold {colour}"), expand=False)
