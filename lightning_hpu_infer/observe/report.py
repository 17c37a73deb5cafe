"""The report of a run: what limited it, what to change next, and the figures behind that; as a value and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from importlib import import_module
from typing import Any

from lightning_hpu_infer.observer import Lane, Stage


class Verdict(str, Enum):
    """What limits the run."""

    INPUT = "input-bound"
    LAUNCH = "launch-bound"
    DEVICE = "device-bound"
    OUTPUT = "output-bound"


class Severity(str, Enum):
    """How much of the device's time the limit costs. A device-bound run has none."""

    NONE = "none"
    MODERATE = "moderate"
    HIGH = "high"


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What spans do not show: graphs and padding of a run."""

    captures: int = 0
    replays: int = 0
    plain_calls: int = 0
    """Calls of the step, or of traced parts of it, that ran without a graph."""
    plain_reasons: dict[str, int] = field(default_factory=dict)
    """Why, in words, and how often."""
    breaks: dict[str, int] = field(default_factory=dict)
    """Where the step is cut into several graphs: TorchDynamo's reason and the line, and how many graphs end there."""
    evictions: int = 0
    """Graphs dropped to make room for others."""
    verified: int = 0
    """Calls whose result was compared with that of the plain ops."""
    padded_elements: int = 0
    """Elements of all inputs, padding included."""
    real_elements: int = 0
    """Elements of all inputs, padding left out."""

    @property
    def padding_waste(self) -> float:
        """Share of the inputs that was padding, from 0 to 1."""
        return 1 - self.real_elements / self.padded_elements if self.padded_elements else 0.0


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """What one stage took in one lane, without the stages inside of it. Several workers at once count once."""

    lane: Lane
    stage: Stage
    seconds: float
    spans: int
    nbytes: int
    """Bytes copied; 0 unless the lane is a queue of copies."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One reason for the device's idle time; without a device trace, for the main thread's time."""

    stage: Stage | None
    """None is host work outside of all stages."""
    verdict: Verdict
    """What limits a run that mostly waits for this."""
    seconds: float
    share: float
    """Of the time that is judged: from the device's first program to its last, or the whole run where there is no
    device trace or most of the run is outside of these."""


@dataclass(frozen=True, kw_only=True)
class DeviceTime:
    """The run's time, in seconds: before the device's first program, between that and its last, and after it."""

    before: float
    busy: float
    idle: float
    """Between its first and its last program, without `busy`; compilation is idle time too."""
    after: float

    @property
    def mostly_outside(self) -> bool:
        """Whether most of the run was before its first program or after its last."""
        return self.before + self.after > self.busy + self.idle


@dataclass(frozen=True, kw_only=True)
class Report:
    """What limited a run. `rich.print(render(report))` prints it, with `observe.render`; `to_json` is for programs."""

    verdict: Verdict
    severity: Severity
    advice: str
    """The next thing to change."""
    measured_on: str
    """Where the spans were recorded, such as "cpu", "HPU" and "emulated HPU"; empty if unknown."""
    batches: int
    """0 if the spans belong to no batches."""
    seconds: float
    """From the first span's start to the last span's end."""
    stages: tuple[StageTime, ...]
    device: DeviceTime | None
    """None without a device trace: the verdict then rests on what the host did."""
    causes: tuple[Cause, ...]
    """Largest first. They add up to the device's idle time between its first program and its last; where most of the
    run is outside of these, to all of its idle time; without a device trace, to the run's time."""
    counters: Counters
    tuning: tuple[str, ...] = ()
    """What `pipelining="auto"` tried, what came of it, and what it ended with."""
    truncated: bool = False
    """Whether only the last part of the run was recorded. The counters are about the whole run even then."""
    error: str = ""
    """What ended the run before its last batch, if anything did."""

    @property
    def throughput(self) -> float:
        """Batches per second."""
        return self.batches / self.seconds if self.seconds else 0.0

    @property
    def efficiency(self) -> float | None:
        """Share of the run during which the device was busy, from 0 to 1; None without a device trace."""
        return (self.device.busy / self.seconds if self.seconds else 0.0) if self.device else None

    @property
    def main_cause(self) -> Cause | None:
        """The largest cause behind the verdict."""
        return next((cause for cause in self.causes if cause.verdict == self.verdict), None)

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        severity = f" ({self.severity.value})" if self.severity != Severity.NONE else ""
        if self.device is None:
            return f"{self.verdict.value}{severity}, judged by the host alone"
        idle, cause = "", self.main_cause
        if cause is not None:
            idle = f", idle {'mostly' if cause == self.causes[0] else 'in part'} for {label_of(cause.stage)}"
        return f"{self.verdict.value}{severity}: device busy {self.efficiency:.0%}{idle}"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        # By its name: the module that draws reports imports this one.
        html: str = import_module("lightning_hpu_infer.observe.render").to_html(self)
        return html

    def as_dict(self) -> dict[str, Any]:
        """All fields, with `throughput` and `efficiency`, as values that `json` can write."""
        return asdict(self) | {"throughput": self.throughput, "efficiency": self.efficiency}

    def to_json(self) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote. Raises as `from_dict` does."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The report that `as_dict` was called on, also after its dict was written as JSON and read back.

        Raises:
            KeyError, TypeError, ValueError: If it is not a report of this version.
        """
        stages = [each | {"lane": Lane(each["lane"]), "stage": Stage(each["stage"])} for each in data["stages"]]
        verdicts = [each | {"verdict": Verdict(each["verdict"])} for each in data["causes"]]
        causes = [each | {"stage": each["stage"] and Stage(each["stage"])} for each in verdicts]
        values = {each.name: data[each.name] for each in fields(cls)} | {
            "verdict": Verdict(data["verdict"]),
            "severity": Severity(data["severity"]),
            "stages": tuple(StageTime(**each) for each in stages),
            "device": data["device"] and DeviceTime(**data["device"]),
            "causes": tuple(Cause(**each) for each in causes),
            "counters": Counters(**data["counters"]),
            "tuning": tuple(data["tuning"]),
        }
        return cls(**values)


def label_of(stage: Stage | None) -> str:
    """A cause's stage in words."""
    return "other host work" if stage is None else stage.value
