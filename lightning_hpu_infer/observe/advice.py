"""The next thing to change in a run, in words that a user can act on."""

import math
from dataclasses import dataclass

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe.report import Report, Verdict
from lightning_hpu_infer.observe.spans import Lane, Stage

_MOST = 1024
"""Of `prefetch` and of `in_flight`."""
_SUPPLY = (Stage.FETCH, Stage.PREPARE, Stage.PIN)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What advice must know of a run beside its flags."""

    precision: str = "32-true"
    """As Lightning names it."""
    progress_bar: bool = False
    """Whether one was shown."""
    cores: int = 0
    """Of the machine; 0 if unknown."""

    @property
    def may_prefetch(self) -> bool:
        """Whether a thread may prepare batches: none may where the step changes torch's default dtype."""
        return self.precision not in ("16-true", "bf16-true", "64-true")


def advise(report: Report, config: InferenceConfig | None, setup: Setup) -> str:
    """What to change next: a flag that helps, or else something of the user's own.

    Args:
        report: One that has its verdict.
        config: The flags as they were on in the end; what is on already is not proposed. None proposes no flags: those
            of a run of another program are not ours.
        setup: What else is known of the run.
    """
    stage = report.main_cause.stage if report.main_cause else None
    device = report.device
    if device is not None and device.mostly_outside and device.before >= device.after:
        return (
            f"{device.before:.3g} s of {report.seconds:.3g} s passed before the device's first program, and it was"
            f" idle above all for {report.causes[0].label}. Predict more batches in one run, or make that beginning"
            " cheaper."
        )
    flag = None
    # On the CPU no device waits, and no flag makes the host work less.
    if config is not None and report.measured_on != "cpu":
        match report.verdict:
            case Verdict.INPUT:
                flag = _input_flag(report, config, setup, stage)
            case Verdict.LAUNCH:
                flag = _launch_flag(report, config, stage)
            case Verdict.OUTPUT:
                flag = _output_flag(report, config, stage)
    if flag is not None:
        return flag
    match report.verdict:
        case Verdict.INPUT:
            return _input_work(report, setup, stage)
        case Verdict.LAUNCH:
            return _launch_work(report, config, setup, stage)
        case Verdict.OUTPUT:
            return _output_work(report, config, setup, stage)
        case Verdict.DEVICE:
            return _device_work(report, config, setup)


def _input_flag(report: Report, on: InferenceConfig, setup: Setup, stage: Stage | None) -> str | None:
    copies = stage == Stage.H2D or (stage == Stage.COPY_IN and not _own_transfer(report))
    if copies and not on.async_copy:
        return "Pass `async_copy=True`: inputs are copied from pinned memory, without holding up the host."
    if not on.pipelining:
        return "Pass `pipelining=True`: the next batch is prepared and copied while the device works on this one."
    if stage in (Stage.COPY_IN, Stage.H2D):
        return None
    if on.prefetch == 0 and setup.may_prefetch:
        return "Pass `prefetch=2`: a thread then prepares the next batches while the main thread does its own work."
    each, depth = _Each(report), on.ahead("hpu")
    # "auto" has tried greater depths itself.
    if on.pipelining != "auto" and 0 < depth < _MOST and each.supply < each.rest:
        return (
            f"Raise `prefetch` from {depth} to {min(2 * depth, _MOST)}: batches are prepared fast enough on the whole,"
            " but unevenly."
        )
    return None


def _input_work(report: Report, setup: Setup, stage: Stage | None) -> str:
    counters, each = report.counters, _Each(report)
    if stage in (Stage.COPY_IN, Stage.H2D):
        if stage == Stage.COPY_IN and _own_transfer(report):
            return (
                "Make `transfer_batch_to_device` and `on_after_batch_transfer` cheaper"
                f" ({each.stage(Stage.COPY_IN)}): what needs no device belongs into the dataset, where the DataLoader's"
                " `num_workers` share it."
            )
        if counters.pinned_copies * 2 < counters.copies:
            return (
                f"Hand over int32 and float32 tensors: only {counters.pinned_copies} of {counters.copies} copies came"
                " from pinned memory, since 64-bit types are converted on the host first."
            )
        return (
            "Copy less to the device: uint8 images and int32 ids, converted there; and make no copies of your own in"
            " `transfer_batch_to_device` or `on_after_batch_transfer`."
        )
    if stage == Stage.PREPARE:
        return (
            f"Move work out of `on_before_batch_transfer` ({each.stage(Stage.PREPARE)}): tokenize and pad in the"
            " dataset or the collate function, where the DataLoader's `num_workers` share it."
        )
    if stage == Stage.PIN:
        return (
            f"Make inputs smaller ({each.stage(Stage.PIN)} to copy them to pinned memory): uint8 images, int32 ids,"
            " normalized or embedded on the device."
        )
    workers = max(2, math.ceil(each.supply / each.rest)) if each.rest else 2
    limit = ""
    if setup.cores:
        workers, limit = min(workers, setup.cores), f", but to no more than the machine's {setup.cores} cores"
    return (
        f"Raise `num_workers` of the DataLoader: fetching takes {each.stage(Stage.FETCH)}, everything else"
        f" {each.rest * 1e3:.3g} ms. From 0 workers, go to {workers}; from more, to {max(workers, 2)} times as many"
        f"{limit}. Workers run the dataset and the collate function: put tokenization and decoding there."
    )


def _own_transfer(report: Report) -> bool:
    """Whether the user's hooks take most of the transfer's time, as far as one can tell."""
    if report.device is None:
        return report.measured_on == "cpu"
    # For each GB a host needs less than a second to convert and stage it.
    copied = sum(copy.seconds + copy.nbytes / 1e9 for copy in report.copies if copy.lane == Lane.H2D)
    return 2 * copied < _Each(report).seconds(Stage.COPY_IN)


def _launch_flag(report: Report, on: InferenceConfig, stage: Stage | None) -> str | None:
    counters = report.counters
    if counters.evictions and stage != Stage.START_HOOKS:
        memory = "" if on.graph_memory is None else f" and `graph_memory` (now {on.graph_memory} bytes)"
        return (
            f"Raise `max_graphs` (now {on.max_graphs}){memory}, or pad batches to fewer shapes (`bucket_lengths`):"
            f" {counters.evictions} graphs were dropped and captured again."
        )
    if stage in (Stage.CAPTURE, Stage.COMPILE):
        return None
    if stage == Stage.LAUNCH and not on.hpu_graphs:
        return "Pass `hpu_graphs=True`: a captured step is replayed without running its Python."
    # The first batch of every shape runs plainly.
    without = counters.plain_calls - counters.captures
    if stage == Stage.LAUNCH and without > counters.replays and report.batches > 3 + on.verify_graphs:
        return (
            f"{without} of {without + counters.replays} calls ran without a graph: the report's list of reasons and the"
            " warnings of the run say why."
        )
    if not on.pipelining:
        return "Pass `pipelining=True`: the next batch is launched while the device works on this one."
    if on.in_flight == 0:
        return "Pass `in_flight=1`: the next batch is launched before this one's output is waited for."
    return None


def _launch_work(report: Report, config: InferenceConfig | None, setup: Setup, stage: Stage | None) -> str:
    counters, each = report.counters, _Each(report)
    if stage in (Stage.CAPTURE, Stage.COMPILE):
        captured = f" ({counters.captures} graphs for {report.batches} batches)" if counters.captures else ""
        buckets = "" if config is None else " (`bucket_lengths`, and a full last batch)"
        return (
            f"Capturing and compiling are paid once per input shape{captured}: predict more batches in one run, or pad"
            f" them to a few shapes{buckets}."
        )
    if stage == Stage.START_HOOKS:
        return f"Make `on_predict_batch_start` hooks cheaper ({each.stage(Stage.START_HOOKS)})."
    where = "between the stages" if stage is None else "to launch"
    graph = ""
    if config is None and stage is not None:
        # A trace that names no device may be a Gaudi's.
        gaudi = "" if report.measured_on else " (on a Gaudi, this package's `hpu_graphs=True`)"
        graph = f", or capture the network as a graph{gaudi}"
    bar = ", and try `enable_progress_bar=False`" if setup.progress_bar else ""
    return (
        f"Use larger batches{graph}: the host works {each.cause(stage)} {where}, however large the batch is. Move"
        f" Python out of `predict_step` into the network{bar}."
    )


def _output_flag(report: Report, on: InferenceConfig, stage: Stage | None) -> str | None:
    if not on.pipelining:
        return (
            "Pass `pipelining=True`: outputs are fetched, and end hooks run, while the device works on a later batch."
        )
    if on.in_flight == 0:
        return "Pass `in_flight=1`: an output is then fetched while the device works on the next batch."
    if stage == Stage.END_HOOKS and not on.defer_hooks:
        return "Pass `defer_hooks=True`: end hooks then run when the output has arrived and do not wait for it."
    each = _Each(report)
    # "auto" has tried greater depths itself.
    if on.pipelining != "auto" and on.in_flight < _MOST and each.lane(Lane.DEVICE) > each.others(Lane.DEVICE):
        return (
            f"Raise `in_flight` from {on.in_flight} to {on.in_flight + 1}: the output side is fast enough on the whole,"
            " but the device runs out of launched batches now and then."
        )
    copies = (Stage.COPY_OUT, Stage.D2H)
    waits = stage in copies or sum(cause.share for cause in report.causes if cause.stage in copies) >= 0.2
    # Where copies take all of the time, they take as long beside other work.
    if not on.async_output and waits and each.seconds(Stage.COPY_OUT) < 0.9 * report.seconds:
        return (
            "Pass `async_output=True`: outputs"
            f" ({each.stage(Stage.COPY_OUT)} to copy them) are then copied while the main thread does its own work."
        )
    return None


def _output_work(report: Report, config: InferenceConfig | None, setup: Setup, stage: Stage | None) -> str:
    each = _Each(report)
    beside = "" if config is not None else ", run them while the device works on a later batch"
    if stage == Stage.END_HOOKS:
        bar = ", and update the progress bar less often" if setup.progress_bar else ""
        return (
            f"Make end hooks cheaper ({each.stage(Stage.END_HOOKS)}){beside}: post-process on the device, write fewer"
            f" and larger files or write in a thread{bar}."
        )
    later = "" if config is not None else " Launch the next batch before this one's output is waited for."
    return (
        "Return less from `predict_step`: reduce on the device (`argmax`, `topk`, pooling) or return half precision,"
        f" and nothing that nobody reads.{later}"
    )


def _device_work(report: Report, config: InferenceConfig | None, setup: Setup) -> str:
    counters = report.counters
    if counters.padding_waste > 0.2:
        return (
            f"The device is the limit, and {counters.padding_waste:.0%} of its input is padding: predict samples of"
            " like lengths together (`group_by_length`), or give `bucket_lengths` more steps."
        )
    if report.measured_on == "cpu":
        return "The computation is the limit, and it runs on the CPU: predict on an HPU."
    how = ["larger batches where it is not filled yet", "more devices" + (" (`devices=2`)" if config else "")]
    if setup.precision.startswith(("32", "64")):
        how.insert(0, "lower precision" + (" (`precision='bf16-true'`)" if config else ""))
    return f"The device is the limit. Faster is {', '.join(how[:-1])}, or {how[-1]}."


class _Each:
    """Times per batch, in seconds or in words."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._batches = max(report.batches, 1)
        self.supply = sum(self.seconds(stage) for stage in _SUPPLY) / self._batches
        """What preparing batches takes, in whichever thread."""
        self.rest = max(self.lane(lane, but=_SUPPLY) for lane in Lane)
        """What the busiest lane works besides."""

    def seconds(self, stage: Stage) -> float:
        """Of the whole run."""
        return sum(time.seconds for time in self._report.stages if time.stage == stage)

    def stage(self, stage: Stage) -> str:
        return self._words(self.seconds(stage))

    def cause(self, stage: Stage | None) -> str:
        return self._words(sum(cause.seconds for cause in self._report.causes if cause.stage == stage))

    def lane(self, lane: Lane, but: tuple[Stage, ...] = ()) -> float:
        waits = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT, Stage.COPY_OUT, Stage.COMPILE, *but)
        work = (time.seconds for time in self._report.stages if time.lane == lane and time.stage not in waits)
        return sum(work) / self._batches

    def others(self, lane: Lane) -> float:
        return max(self.lane(other) for other in Lane if other != lane)

    def _words(self, seconds: float) -> str:
        return f"{seconds / self._batches * 1e3:.3g} ms" + (" per batch" if self._report.batches else " in all")
