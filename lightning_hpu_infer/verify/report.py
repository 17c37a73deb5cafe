"""Everything that `verify` found, as a value and as the file that a user attaches to an issue."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_hpu_infer.verify.catalogue import assumptions
from lightning_hpu_infer.verify.check import Kind, Mode, Result, Verdict

FORMAT = 1
"""Of the file; grows with changes that a reader would notice."""


@dataclass(kw_only=True)
class VerifyReport:
    """What was found so far."""

    version: str
    """Of this package."""
    date: str
    """In UTC, as in 2026-01-31T23:59:59."""
    modes: tuple[Mode, ...]
    quick: bool = False
    only: tuple[str, ...] = ()
    """Parts of names that were asked for; empty for all checks."""
    interrupted: bool = False
    diagnoses: dict[Mode, dict[str, Any]] = field(default_factory=dict)
    """What `doctor` says in each mode."""
    results: list[Result] = field(default_factory=list)

    @property
    def emulated(self) -> bool:
        """Whether the device is the emulator's."""
        return any(diagnosis["facts"]["emulated"] for diagnosis in self.diagnoses.values())

    @property
    def device(self) -> str:
        """What was verified, in words."""
        facts: list[dict[str, Any]] = [diagnosis["facts"] for diagnosis in self.diagnoses.values()]
        if self.emulated:
            return "the emulator: its figures are not a Gaudi's, and what holds on it need not hold on one"
        names = {each["device_name"] or "an HPU" for each in facts if each["device_count"]}
        return ", ".join(sorted(names)) or "no device"

    def found(self, verdict: Verdict, kind: Kind | None = None) -> list[Result]:
        """The results with a verdict.

        Args:
            verdict: The verdict.
            kind: Of the checks; None for all.
        """
        return [each for each in self.results if each.verdict == verdict and kind in (None, each.kind)]

    @property
    def exit_code(self) -> int:
        """0 if nothing is broken, 1 otherwise."""
        return int(bool(self.found(Verdict.BROKEN)))

    def to_json(self) -> str:
        """The report as JSON, with what is assumed."""
        told = [{name: getattr(each, name) for name in _TOLD} for each in assumptions()]
        verdicts = counted(self.results)
        found = {"format": FORMAT, "device": self.device, "emulated": self.emulated, "verdicts": verdicts}
        return json.dumps(found | asdict(self) | {"assumptions": told}, indent=1)

    def write(self, path: Path) -> None:
        """Write the file. Whoever reads it meanwhile sees the old one or the new one."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(self.to_json() + "\n")
        temporary.replace(path)


_TOLD = ("name", "statement", "source", "turns_off", "modes")


def counted(results: Iterable[Result]) -> dict[str, int]:
    """How many results there are of each verdict."""
    counts = Counter(result.verdict.value for result in results)
    return {verdict.value: counts[verdict.value] for verdict in Verdict}
