"""The next thing to change in a run, in words that a user can act on."""

import math

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.report import Report, Verdict
from lightning_hpu_infer.trace import Lane, Stage


def advise(report: Report, config: InferenceConfig | None) -> str:
    """What to change next.

    Args:
        report: One that has its verdict.
        config: The flags that were on; what is on already is not proposed. None counts as all off.
    """
    on = config or InferenceConfig(hpu_graphs=False, async_copy=False, pipelining=False)
    stage = report.main_cause.stage if report.main_cause else None
    match report.verdict:
        case Verdict.INPUT:
            return _input_advice(report, on, stage)
        case Verdict.LAUNCH:
            return _launch_advice(report, on, stage)
        case Verdict.OUTPUT:
            return _output_advice(report, on, stage)
        case Verdict.DEVICE:
            return _device_advice(report)


def _input_advice(report: Report, on: InferenceConfig, stage: Stage | None) -> str:
    if stage in (Stage.COPY_IN, Stage.H2D):
        return _copy_advice(report, on)
    if not on.pipelining:
        return "Pass `pipelining=True`: a thread then prepares the next batches while the device works."
    if on.prefetch == 0:
        return "Pass `prefetch=2`: with 0 each batch is prepared only when the device is out of work."
    each = _Each(report)
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
    supply, rest = each.lane(Lane.PREFETCH), each.others(Lane.PREFETCH)
    if supply < rest:
        return (
            f"Raise `prefetch` from {on.prefetch or 2} to {2 * (on.prefetch or 2)}: batches are prepared fast enough on"
            " the whole, but unevenly."
        )
    workers = max(2, math.ceil(supply / rest)) if rest else 2
    return (
        f"Raise `num_workers` of the DataLoader: fetching takes {each.stage(Stage.FETCH)}, everything else"
        f" {rest * 1e3:.3g} ms. From 0 workers, go to {workers}; from more, to {workers} times as many. Workers run the"
        " dataset and the collate function: put tokenization and decoding there."
    )


def _copy_advice(report: Report, on: InferenceConfig) -> str:
    counters = report.counters
    if not on.async_copy:
        return "Pass `async_copy=True`: inputs are copied from pinned memory, without holding up the host."
    if not on.pipelining:
        return "Pass `pipelining=True`: the next batch is copied while the device works on this one."
    if counters.pinned_copies * 2 < counters.copies:
        return (
            f"Hand over int32 and float32 tensors: only {counters.pinned_copies} of {counters.copies} copies came from"
            " pinned memory, since 64-bit types are converted on the host first."
        )
    return (
        "Copy less to the device: uint8 images and int32 ids, converted there; and make no copies of your own in"
        " `transfer_batch_to_device` or `on_after_batch_transfer`."
    )


def _launch_advice(report: Report, on: InferenceConfig, stage: Stage | None) -> str:
    counters, each = report.counters, _Each(report)
    if stage in (Stage.CAPTURE, Stage.COMPILE):
        captured = f" ({counters.captures} graphs for {report.batches} batches)" if counters.captures else ""
        return (
            f"Capturing and compiling are paid once per input shape{captured}: predict more batches in one run, or pad"
            " them to a few shapes (`bucket_lengths`, and a full last batch)."
        )
    if not on.hpu_graphs:
        return (
            "Pass `hpu_graphs=True`, with PT_HPU_LAZY_MODE=1 in the environment: a captured network is replayed without"
            " running its Python."
        )
    if counters.evictions:
        return (
            f"Raise `max_graphs` (now {on.max_graphs}), or pad batches to fewer shapes (`bucket_lengths`):"
            f" {counters.evictions} graphs were dropped and captured again."
        )
    if counters.plain_calls > counters.replays:
        return (
            f"{counters.plain_calls} of {counters.plain_calls + counters.replays} calls of networks ran without a"
            " graph: the warnings of the run say why."
        )
    if not on.pipelining:
        return "Pass `pipelining=True`: the next batch is launched while the device works on this one."
    if on.in_flight == 0:
        return "Pass `in_flight=1`: the next batch is launched before this one's output is waited for."
    if stage == Stage.START_HOOKS:
        return f"Make `on_predict_batch_start` hooks cheaper ({each.stage(Stage.START_HOOKS)})."
    where = "between the stages" if stage is None else "to launch"
    return (
        f"Use larger batches: the host works {each.cause(stage)} {where}, however large the batch is. Move Python"
        " out of `predict_step` into the network, and try `enable_progress_bar=False`."
    )


def _output_advice(report: Report, on: InferenceConfig, stage: Stage | None) -> str:
    if not on.pipelining:
        return (
            "Pass `pipelining=True`: outputs are fetched, and end hooks run, while the device works on a later batch."
        )
    if on.in_flight == 0:
        return "Pass `in_flight=1`: an output is then fetched while the device works on the next batch."
    if stage == Stage.END_HOOKS and not on.defer_hooks:
        return "Pass `defer_hooks=True`: end hooks then run when the output has arrived and do not wait for it."
    each = _Each(report)
    if each.lane(Lane.DEVICE) > each.others(Lane.DEVICE):
        return (
            f"Raise `in_flight` from {on.in_flight} to {on.in_flight + 1}: the output side is fast enough on the whole,"
            " but the device runs out of launched batches now and then."
        )
    if stage == Stage.END_HOOKS:
        return (
            f"Make end hooks cheaper ({each.stage(Stage.END_HOOKS)}): post-process on the device, write fewer and"
            " larger files or write in a thread, and update the progress bar less often."
        )
    return (
        "Return less from `predict_step`: reduce on the device (`argmax`, `topk`, pooling) or return half precision,"
        " and nothing that nobody reads."
    )


def _device_advice(report: Report) -> str:
    counters, device = report.counters, report.device
    if device is not None and device.before + device.after > device.busy + device.idle:
        return (
            f"The device keeps busy once it runs, but {device.before:.3g} s passed before its first program and"
            f" {device.after:.3g} s after its last, of {report.seconds:.3g} s: predict more batches in one run."
        )
    if counters.padding_waste > 0.2:
        return (
            f"The device is the limit, and {counters.padding_waste:.0%} of its input is padding: sort samples by"
            " length, or give `bucket_lengths` more steps."
        )
    if report.measured_on == "cpu":
        return "The computation is the limit, and it runs on the CPU: predict on an HPU."
    return (
        "The device is the limit. Faster is lower precision (`precision='bf16-true'`), larger batches where it is not"
        " filled yet, or more devices (`devices=2`)."
    )


class _Each:
    """Times per batch, in seconds or in words."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._batches = max(report.batches, 1)

    def stage(self, stage: Stage) -> str:
        return self._words(sum(time.seconds for time in self._report.stages if time.stage == stage))

    def cause(self, stage: Stage | None) -> str:
        return self._words(sum(cause.seconds for cause in self._report.causes if cause.stage == stage))

    def lane(self, lane: Lane) -> float:
        waits = (Stage.WAIT_INPUT, Stage.WAIT_OUTPUT, Stage.COPY_OUT, Stage.COMPILE)
        work = (time.seconds for time in self._report.stages if time.lane == lane and time.stage not in waits)
        return sum(work) / self._batches

    def others(self, lane: Lane) -> float:
        return max(self.lane(other) for other in Lane if other != lane)

    def _words(self, seconds: float) -> str:
        return f"{seconds / self._batches * 1e3:.3g} ms" + (" per batch" if self._report.batches else " in all")
