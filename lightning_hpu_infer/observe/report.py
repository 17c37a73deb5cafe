"""What a run's spans say, as a value that prints itself and goes to JSON and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from lightning_hpu_infer.observe.spans import Lane, Stage

if TYPE_CHECKING:
    from rich.console import RenderableType


class Verdict(str, Enum):
    """What limits the run."""

    INPUT = "input-bound"
    LAUNCH = "launch-bound"
    DEVICE = "device-bound"
    OUTPUT = "output-bound"


class Severity(str, Enum):
    """How much of the device's time it costs. A device-bound run has none."""

    NONE = "none"
    MODERATE = "moderate"
    HIGH = "high"


_VERDICTS: dict[Stage | None, Verdict] = {
    **dict.fromkeys((Stage.FETCH, Stage.PREPARE, Stage.PIN, Stage.WAIT_INPUT, Stage.COPY_IN, Stage.H2D), Verdict.INPUT),
    **dict.fromkeys(
        (Stage.START_HOOKS, Stage.LAUNCH, Stage.CAPTURE, Stage.REPLAY, Stage.COMPILE, None), Verdict.LAUNCH
    ),
    **dict.fromkeys((Stage.WAIT_OUTPUT, Stage.COPY_OUT, Stage.END_HOOKS, Stage.D2H), Verdict.OUTPUT),
    Stage.DEVICE: Verdict.DEVICE,
}


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What spans do not show: graphs, padding and staging of a run."""

    captures: int = 0
    replays: int = 0
    plain_calls: int = 0
    """Calls of the step, or of traced parts of it, that ran without a graph."""
    plain_reasons: dict[str, int] = field(default_factory=dict)
    """Why, in words, and how often."""
    evictions: int = 0
    """Graphs dropped to make room for others."""
    verified: int = 0
    """Calls that were compared with the plain ops."""
    padded_elements: int = 0
    """Elements of all inputs as the device got them."""
    real_elements: int = 0
    """Those of them that were no padding."""
    pinned_copies: int = 0
    copies: int = 0
    """Tensors copied to the device; `pinned_copies` of them from pinned memory."""

    @property
    def padding_waste(self) -> float:
        """Share of the inputs that was padding."""
        return 1 - self.real_elements / self.padded_elements if self.padded_elements else 0.0


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """What one stage took in one lane, without the stages inside of it."""

    lane: Lane
    stage: Stage
    seconds: float
    share: float
    """Of the run's time. Those of a lane add up to 1 at most: the rest was spent on no stage."""
    spans: int


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What the device's idle time went to; without a device trace, the main thread's time."""

    stage: Stage | None
    """None is host work outside of all stages."""
    seconds: float
    share: float
    """Of the time that is judged: from the device's first program to its last, or the run's time, if there is no device
    trace or most of the time is outside of these."""

    @property
    def label(self) -> str:
        """The stage in words."""
        return self.stage.value if self.stage is not None else "other host work"


@dataclass(frozen=True, kw_only=True)
class DeviceTime:
    """The device's part of the run, in seconds. The four add up to the run's time."""

    before: float
    """Until its first program."""
    busy: float
    idle: float
    """Between its first and its last program; compilation is idle time too."""
    after: float
    """Since its last program."""

    @property
    def mostly_outside(self) -> bool:
        """Whether most of the run was before its first program or after its last."""
        return self.before + self.after > self.busy + self.idle


@dataclass(frozen=True, kw_only=True)
class CopyTime:
    """One direction of copies."""

    lane: Lane
    nbytes: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run's spans say. Prints itself with `rich.print(report)`; `to_json` is for programs."""

    verdict: Verdict
    severity: Severity
    advice: str
    """The next thing to change."""
    measured_on: str
    """Where the spans were recorded, as the caller named it."""
    batches: int
    """0 if the spans do not say."""
    seconds: float
    """From the first span's start to the last span's end."""
    stages: tuple[StageTime, ...]
    device: DeviceTime | None
    """None without a device trace: the verdict is the host's side of the story then."""
    causes: tuple[Cause, ...]
    """Largest first. They add up to the device's idle time between its first program and its last; where most of the
    run is outside of these, to all of its idle time; without a device trace, to the run's time."""
    copies: tuple[CopyTime, ...]
    bound: Lane
    """The busiest lane. All lanes work at the same time at best, so it sets the pace that can be reached."""
    bound_seconds: float
    """What that lane worked, waits left out."""
    counters: Counters
    tuning: tuple[str, ...] = ()
    """What `pipelining="auto"` tried, what came of it, and what it ended with."""
    truncated: bool = False
    """Whether only the last part of the run was recorded: all but the counters are about that part."""

    @property
    def throughput(self) -> float:
        """Batches per second."""
        return share_of(self.batches, self.seconds)

    @property
    def efficiency(self) -> float | None:
        """Share of the run, from its first span to its last, during which the device was busy: of its ceiling."""
        return share_of(self.device.busy, self.seconds) if self.device else None

    @property
    def idle_share(self) -> float | None:
        """Idle share of the device's time from its first program to its last."""
        return share_of(self.device.idle, self.device.busy + self.device.idle) if self.device else None

    def verdict_of(self, stage: Stage | None) -> Verdict:
        """What limits a run that mostly waits for this stage; None is host work outside of all stages."""
        if self.device is None:
            if stage == Stage.WAIT_OUTPUT:
                return Verdict.DEVICE
            if stage in (Stage.LAUNCH, Stage.REPLAY) and self.measured_on == "cpu":
                return Verdict.DEVICE
        return _VERDICTS[stage]

    @property
    def main_cause(self) -> Cause | None:
        """The largest cause behind the verdict."""
        return next((cause for cause in self.causes if self.verdict_of(cause.stage) == self.verdict), None)

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        line = self.verdict.value
        if self.severity != Severity.NONE:
            line += f" ({self.severity.value})"
        if self.device is None:
            return f"{line}, judged by the host alone"
        line += f": device busy {self.efficiency:.0%}"
        if self.main_cause is None:
            return line
        how_much = "mostly" if self.main_cause == self.causes[0] else "in part"
        return f"{line}, idle {how_much} for {self.main_cause.label}"

    def as_dict(self) -> dict[str, Any]:
        """Fields, and the properties worth having beside them, as JSON values."""
        fields = asdict(self, dict_factory=lambda items: {name: _plain(value) for name, value in items})
        return fields | {
            "throughput": self.throughput,
            "efficiency": self.efficiency,
            "idle_share": self.idle_share,
            "padding_waste": self.counters.padding_waste,
        }

    def to_json(self) -> str:
        """`as_dict` as text. `from_json` gives back an equal report."""
        return json.dumps(self.as_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: If it is no report.
        """
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """Read what `as_dict` made.

        Raises:
            KeyError, TypeError, ValueError: If it is no report.
        """
        return cls(
            verdict=Verdict(data["verdict"]),
            severity=Severity(data["severity"]),
            advice=data["advice"],
            measured_on=data["measured_on"],
            batches=data["batches"],
            seconds=data["seconds"],
            stages=tuple(
                StageTime(**entry | {"lane": Lane(entry["lane"]), "stage": Stage(entry["stage"])})
                for entry in data["stages"]
            ),
            device=DeviceTime(**data["device"]) if data["device"] else None,
            causes=tuple(
                Cause(**entry | {"stage": entry["stage"] and Stage(entry["stage"])}) for entry in data["causes"]
            ),
            copies=tuple(CopyTime(**entry | {"lane": Lane(entry["lane"])}) for entry in data["copies"]),
            bound=Lane(data["bound"]),
            bound_seconds=data["bound_seconds"],
            counters=Counters(**data["counters"]),
            tuning=tuple(data.get("tuning", ())),
            truncated=data.get("truncated", False),
        )

    def __rich__(self) -> "RenderableType":
        from lightning_hpu_infer.observe.render import render

        return render(self)


def share_of(part: float, whole: float) -> float:
    """Part of the whole, 0 if there is nothing."""
    return part / whole if whole > 0 else 0.0


def _plain(value: object) -> object:
    return value.value if isinstance(value, Enum) else value
