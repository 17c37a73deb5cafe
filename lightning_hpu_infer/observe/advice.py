"""The next thing to change in a run: a flag that helps, or else something in the user's code."""

import math
from dataclasses import dataclass

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe.report import Report, Verdict, label_of
from lightning_hpu_infer.observer import WAITS, Lane, Stage

_MAX_DEPTH = 1024  # of `prefetch` and of `in_flight`
_SUPPLY = (Stage.FETCH, Stage.PREPARE, Stage.PIN)
_HOOKS: dict[Stage | None, str] = {
    Stage.PREPARE: "`on_before_batch_transfer`",
    Stage.COPY_IN: "`transfer_batch_to_device` and `on_after_batch_transfer`",
}
_WAITS = (*WAITS, Stage.COPY_OUT, Stage.COMPILE)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What advice must know of a run besides its flags.

    `precision` is as Lightning names it; `cores` are the machine's, 0 if unknown.
    """

    precision: str = "32-true"
    progress_bar: bool = False
    cores: int = 0

    @property
    def may_prefetch(self) -> bool:
        """Whether a thread may prepare batches: none may where the step changes torch's default dtype."""
        return self.precision not in ("16-true", "bf16-true", "64-true")


def advise(report: Report, config: InferenceConfig | None, setup: Setup) -> str:
    """What to change next.

    Args:
        report: Complete but for its advice.
        config: The flags, with the depths that the run ended with; what is on already is not proposed. None is a run of
            another program, to which no flag is proposed.
        setup: What else is known of the run.
    """
    device, advice = report.device, _Advice(report, config, setup)
    if device is not None and device.mostly_outside and device.before >= device.after:
        return (
            f"{device.before:.3g} s of {report.seconds:.3g} s passed before the device's first program, mostly spent on"
            f" {label_of(report.causes[0].stage)}. Predict more batches in one run, or make that beginning cheaper."
        )
    rules = {
        Verdict.INPUT: advice.on_input,
        Verdict.LAUNCH: advice.on_launch,
        Verdict.OUTPUT: advice.on_output,
        Verdict.DEVICE: advice.on_device,
    }
    return rules[report.verdict]()


class _Advice:
    """Advice for each verdict: the first rule that applies; those that propose a flag come first."""

    def __init__(self, report: Report, config: InferenceConfig | None, setup: Setup) -> None:
        self._report, self._setup, self._cause = report, setup, report.main_cause
        self._stage = self._cause.stage if self._cause else None
        self._each = self._in_words(self._seconds(self._stage))
        self._foreign = config is None
        # On the CPU no device waits, and no flag makes the host work less.
        self._flags = config if report.measured_on != "cpu" else None

    def on_input(self) -> str:
        stage, on, supply, rest = self._stage, self._flags, self._seconds(*_SUPPLY), self._busiest(but=_SUPPLY)
        hooks = _HOOKS.get(stage) if stage != Stage.COPY_IN or self._transfer_is_hooks() else None
        copies = stage in (Stage.COPY_IN, Stage.H2D)
        if on is not None:
            depth = on.prefetch_depth("hpu")
            if copies and not hooks and not on.async_copy:
                return "Pass `async_copy=True`: inputs are copied from pinned memory, and the host does not wait."
            if not on.pipelining:
                return "Pass `pipelining=True`: the next batch is prepared and copied while the device computes."
            if not copies and on.prefetch == 0 and self._setup.may_prefetch:
                return "Pass `prefetch=2`: a thread prepares the next batches while the main thread does other work."
            # "auto" has tried greater depths.
            if not copies and on.pipelining != "auto" and 0 < depth < _MAX_DEPTH and supply < rest:
                return f"Raise `prefetch` to {min(2 * depth, _MAX_DEPTH)}: only some batches take long to prepare."
        if hooks:
            return (
                f"Make {hooks} cheaper ({self._each}): what needs no device belongs in the dataset or the"
                " collate function, where the DataLoader's `num_workers` share the work."
            )
        if copies or stage == Stage.PIN:
            return "Copy less to the device: uint8 images and int32 ids, converted or embedded there."
        workers, limit = max(2, math.ceil(supply / rest)) if rest else 2, ""
        if cores := self._setup.cores:
            workers, limit = min(workers, max(cores, 2)), f", but to no more than the machine's {cores} cores"
        return (
            f"Raise `num_workers` of the DataLoader: fetching takes {self._in_words(self._seconds(Stage.FETCH))},"
            f" everything else {self._in_words(rest)}. From 0 workers, go to {workers}; from more, to {workers} times"
            f" as many{limit}. Workers run the dataset and the collate function: put tokenization and decoding there."
        )

    def on_launch(self) -> str:
        stage, on, counters, batches = self._stage, self._flags, self._report.counters, self._report.batches
        compiles = stage in (Stage.TRACE, Stage.CAPTURE, Stage.COMPILE)
        if on is not None:
            # The first batch of every shape always runs plainly.
            plain = counters.plain_calls - counters.captures
            if counters.evictions and stage != Stage.START_HOOKS:
                bounds = f"`max_graphs` (now {on.max_graphs}) or `graph_memory` (now {on.graph_memory})"
                lost = f"{counters.evictions} graphs were dropped and captured again"
                return f"Raise {bounds}, or pad batches to fewer shapes (`bucket_lengths`): {lost}."
            if stage == Stage.LAUNCH and not on.hpu_graphs:
                return "Pass `hpu_graphs=True`: a captured step is replayed without running its Python."
            if stage == Stage.LAUNCH and plain > counters.replays and batches > 3 + on.verify_graphs:
                number = f"{plain} of {plain + counters.replays} calls"
                return f"{number} ran without a graph: the report's list of reasons and the run's warnings say why."
            if stage in (Stage.LAUNCH, Stage.REPLAY) and (cut := next(iter(counters.breaks), "")):
                return (
                    f"Let the step be one graph; it is cut there: {cut}. What Python reads from a tensor (`.item()`,"
                    " `if`) waits for the device: keep it on the device (`torch.where`), or do it in `postprocess`."
                )
            if not compiles and not on.pipelining:
                return "Pass `pipelining=True`: the next batch is launched while the device computes."
            if not compiles and on.in_flight_depth("hpu") == 0:
                return "Pass `in_flight=1`: the next batch is launched before this one's output is waited for."
        if compiles:
            captured = f" (captures: {counters.captures}, batches: {batches})" if counters.captures else ""
            buckets = "" if self._foreign else " (`bucket_lengths`, and a full last batch)"
            return (
                f"Tracing, captures and compilations are paid once per input shape{captured}: predict more batches in"
                f" one run, or pad them to a few shapes{buckets}."
            )
        if stage == Stage.START_HOOKS:
            return f"Make `on_predict_batch_start` hooks cheaper ({self._each})."
        ours = " (this package's `hpu_graphs=True`)" if self._report.measured_on.startswith("HPU") else ""
        graph = f", or capture the network as a graph{ours}" if self._foreign else ""
        cost = self._in_words(self._cause.seconds if self._cause else 0.0)
        return (
            f"Use larger batches{graph}: the host needs {cost} for {label_of(stage)}, however large the batch is."
            " Move Python out of `predict_step` into the network."
        )

    def on_output(self) -> str:
        stage, on = self._stage, self._flags
        if stage == Stage.WAIT_POSTPROCESS:
            gil = "`postprocess_backend='process'` if `postprocess` is Python code, of which threads run one at a time"
            return f"Raise `postprocess_workers`; or pass {gil}; or make it cheaper."
        if stage in (Stage.WRITE, Stage.WAIT_WRITER):
            return "Write fewer `columns` or half precision, with a cheap codec, or to a faster disk."
        if on is not None:
            if not on.pipelining:
                return "Pass `pipelining=True`: outputs are copied, and end hooks run, while the device computes."
            if (depth := on.in_flight_depth("hpu")) == 0:
                return "Pass `in_flight=1`: an output is then copied while the device works on the next batch."
            if stage == Stage.END_HOOKS and not on.defer_hooks:
                return "Pass `defer_hooks=True`: end hooks then run once the output has arrived, without waiting."
            # "auto" has tried greater depths.
            uneven = self._seconds(Stage.DEVICE) > self._busiest(but=(Stage.DEVICE,))
            if uneven and on.pipelining != "auto" and depth < _MAX_DEPTH:
                return f"Raise `in_flight` to {depth + 1}: now and then the device runs out of launched batches."
            # Where copies take all of the time, there is no other work to do meanwhile.
            if not on.async_output and 0.2 <= self._seconds(Stage.COPY_OUT) / self._report.seconds < 0.9:
                return "Pass `async_output=True`: outputs are then copied while the main thread does other work."
        if stage == Stage.POSTPROCESS:
            return f"Let workers run `postprocess` ({self._each}), which runs in place (docs/postprocess.md)."
        if stage == Stage.END_HOOKS:
            bar = ", and try `enable_progress_bar=False`" if self._setup.progress_bar else ""
            return (
                f"Make end hooks cheaper ({self._each}): post-process on the device or in `postprocess`, write fewer"
                f" and larger files or write in a thread{bar}."
            )
        return (
            "Return less from `predict_step`: reduce on the device (`argmax`, `topk`, pooling), return half precision,"
            " and leave out what nobody reads."
        )

    def on_device(self) -> str:
        if (waste := self._report.counters.padding_waste) > 0.2:
            return (
                f"The device is the limit, and {waste:.0%} of its input is padding: predict samples of similar length"
                " together (`group_by_length`), or give `bucket_lengths` more steps."
            )
        if self._report.measured_on == "cpu":
            return "The computation is the limit, and it runs on the CPU: predict on an HPU."
        lower = "lower precision (`precision='bf16-true'`), " if self._setup.precision.startswith(("32", "64")) else ""
        return f"The device is the limit. Try {lower}larger batches where it is not filled yet, or more devices."

    def _seconds(self, *stages: Stage | None) -> float:
        return sum(time.seconds for time in self._report.stages if time.stage in stages)

    def _busiest(self, but: tuple[Stage, ...]) -> float:
        """Seconds that the busiest lane works on other stages than these."""
        times = [time for time in self._report.stages if time.stage not in (*_WAITS, *but)]
        return max(sum(time.seconds for time in times if time.lane == lane) for lane in Lane)

    def _transfer_is_hooks(self) -> bool:
        """Whether the user's hooks take most of the transfer's time, as far as one can tell."""
        if self._report.device is None:
            return self._report.measured_on == "cpu"
        # The host needs less than a second to convert and pin 1 GB.
        copying = sum(time.seconds + time.nbytes / 1e9 for time in self._report.stages if time.lane == Lane.H2D)
        return 2 * copying < self._seconds(Stage.COPY_IN)

    def _in_words(self, seconds: float) -> str:
        unit = "per batch" if self._report.batches else "in all"
        return f"{seconds / (self._report.batches or 1) * 1e3:.3g} ms {unit}"
