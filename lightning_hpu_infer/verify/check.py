"""One check of the device: what it is called, what it says, and what came of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

Mode = Literal["lazy", "eager"]
"""The bridge's mode, fixed for a process by `PT_HPU_LAZY_MODE` before Python starts."""
MODES: tuple[Mode, ...] = ("lazy", "eager")


class Kind(str, Enum):
    """What a check is about."""

    ASSUMPTION = "assumption"
    """Something that the plugin takes for granted of the bridge."""
    TECHNIQUE = "technique"
    """Predictions of a model with a technique, against all techniques off and against the CPU."""
    CHANGE = "change"
    """Predictions around a change that a user makes between two batches."""
    TIMING = "timing"
    """How long a run takes with techniques off and on."""
    CONTRACT = "contract"
    """A test of the contract suite."""
    PROCESS = "process"
    """Whether the process that runs the checks of a mode begins at all."""


class Verdict(str, Enum):
    """What came of a check."""

    HELD = "held"
    BROKEN = "broken"
    NOT_TRIED = "not tried"


class Broken(Exception):
    """Raised by a check: what it says is not so. The message is what was seen."""


class NotTried(Exception):
    """Raised by a check that cannot tell here. The message says why."""


@dataclass(frozen=True)
class Seen:
    """What a check saw while everything was as it should be.

    Args:
        text: In words.
        figures: What a program may want to read, as JSON has it.
    """

    text: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something to find out about the device."""

    kind: Kind
    name: str
    run: Callable[[], Seen]
    """Asks the device, in the main thread. Raises `Broken` or `NotTried`; any other error counts as broken."""
    turns_off: str = ""
    """What a user has to set if it is broken."""

    @property
    def id(self) -> str:
        """Unlike those of all other checks of a mode."""
        return f"{self.kind.value}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A check in one mode, and what came of it."""

    mode: Mode
    kind: Kind
    name: str
    verdict: Verdict
    seen: str = ""
    """What was seen, or why it was not tried."""
    turns_off: str = ""
    """What to set; empty unless broken."""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    details: str = ""
    """A traceback, or the end of what a process that died had printed."""

    @property
    def id(self) -> str:
        """That of the check."""
        return f"{self.kind.value}: {self.name}"
