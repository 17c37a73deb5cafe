"""A traced run: from the first span to the files that show where its time went."""

import os
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe import chrome
from lightning_hpu_infer.observe.advice import Setup
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.report import Counters, Report
from lightning_hpu_infer.observe.spans import Span, Trace
from lightning_hpu_infer.observer import Lane, Stage

_LANES = {"compute": Lane.DEVICE, "h2d": Lane.H2D, "d2h": Lane.D2H}
_STAGES = {Lane.DEVICE: Stage.DEVICE, Lane.H2D: Stage.H2D, Lane.D2H: Stage.D2H}

Totals: TypeAlias = tuple[Counters, tuple[int, int] | None, Sequence[str]]
"""What spans do not show of a run; `prefetch` and `in_flight` in the end, if they were not fixed; and what was tried to
find these, in words."""


class TracedRun:
    """Records one run on all of its lanes. However it ends, its report is handed over then, and in the folder.

    The device's own lanes come from the emulator. On hardware the HPU profiler has them: give its trace to
    `python -m lightning_hpu_infer diagnose`.

    Args:
        config: The flags of the run. `trace` is the folder to write to.
        device: Where the step runs.
        totals: Called when the run has ended.
        keep: Called with the report.
        precision: As Lightning names it.
        progress_bar: Whether one is shown.
        rank: Of this process, where several write into folders of their own.
    """

    def __init__(
        self,
        config: InferenceConfig,
        device: torch.device,
        totals: Callable[[], Totals],
        keep: Callable[[Report], object],
        *,
        precision: str = "32-true",
        progress_bar: bool = False,
        rank: int | None = None,
    ) -> None:
        self.trace = Trace()
        self._config = config
        self._device = device
        self._totals = totals
        self._keep = keep
        self._setup = Setup(precision=precision, progress_bar=progress_bar, cores=os.cpu_count() or 0)
        self._rank = rank
        self._on_hpu = device.type == _habana.DEVICE_TYPE
        self.spans: list[Span] = []

    @classmethod
    def of_trainer(cls, config: InferenceConfig, trainer: Any, totals: Callable[[], Totals]) -> "TracedRun":
        """One of a Trainer, whose accelerator keeps the report."""
        return cls(
            config,
            trainer.strategy.root_device,
            totals,
            partial(setattr, trainer.accelerator, "report"),
            precision=str(trainer.precision),
            progress_bar=trainer.progress_bar_callback is not None,
            rank=trainer.global_rank if trainer.world_size > 1 else None,
        )

    def __enter__(self) -> "TracedRun":
        if self._on_hpu:
            _habana.start_timeline()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """End the recording, hand the report over, and write both to the folder.

        Whatever fails is said only: neither are predictions that may have taken hours lost for a full disk, nor the
        error that ended the run.
        """
        try:
            report = self.finish(*self._totals())
            if report is not None:
                report = replace(report, error=f"{type(error).__name__}: {error}" if error is not None else "")
                self._keep(report)
                folder = Path(self._config.trace or "")
                self.write(report, folder if self._rank is None else folder / f"rank{self._rank}")
        except Exception as problem:
            say = rank_zero_warn if error is None else rank_zero_info  # a warning may be an error, and hide the other
            say(f"The trace of this run could not be written to {self._config.trace}: {problem!r}")
        finally:
            if self._on_hpu:
                _habana.stop_timeline()

    def finish(
        self, counters: Counters, depths: tuple[int, int] | None = None, tuning: Sequence[str] = ()
    ) -> Report | None:
        """End the recording and judge the run. None if there was no batch."""
        spans = self.trace.spans()
        launched = {span.batch for span in spans if span.stage == Stage.LAUNCH}
        # The fetch that finds the end of the data, say, is for no batch.
        spans = [span if span.batch in launched else replace(span, batch=None) for span in spans]
        threaded = any(span.lane == Lane.PREFETCH for span in spans)
        if not threaded:
            # The main thread waits for nobody: it prepares the batches itself.
            spans = [span for span in spans if span.stage != Stage.WAIT_INPUT]
        measured_on = "cpu"
        if self._on_hpu:
            measured_on = "emulated HPU" if _habana.is_emulated() else "HPU"
            spans += _device_spans(_habana.stop_timeline(), spans)
        # A time of which only one thread is known would look as if the others had done nothing.
        self.spans = [span for span in spans if span.start >= self.trace.complete_from]
        if not launched:
            return None
        return analyse(
            self.spans,
            config=self._as_it_ran(depths, threaded=threaded),
            setup=self._setup,
            counters=counters,
            measured_on=measured_on,
            tuning=tuning,
            truncated=len(self.spans) < len(spans),
        )

    def write(self, report: Report, folder: Path) -> None:
        """Write `trace.json` for Perfetto, `report.json`, and the timeline as `timeline.png` and `timeline.svg`.

        Each file is complete from when it has its name.

        Raises:
            OSError: If the folder cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with _whole(folder / "trace.json") as path:
            chrome.write(self.spans, path, {"report": report.as_dict()})
        with _whole(folder / "report.json") as path:
            path.write_text(report.to_json())
        picture = ""
        if find_spec("matplotlib") is None:
            rank_zero_warn("There is no timeline picture without matplotlib: pip install lightning-hpu-infer[plots]")
        else:
            from lightning_hpu_infer.observe import timeline as plots

            for suffix in ("png", "svg"):
                with _whole(folder / f"timeline.{suffix}") as path:
                    plots.timeline(self.spans, path, title=report.summary)
            picture = ", timeline.png"
        rank_zero_info(
            f"{report.summary}\n{report.advice}\nSee {folder}: trace.json (for ui.perfetto.dev), report.json{picture}."
        )

    def _as_it_ran(self, depths: tuple[int, int] | None, *, threaded: bool) -> InferenceConfig:
        """The flags with the depths that there were in the end: `prefetch` is 0 where no thread ran."""
        config, device = self._config, self._device
        prefetch, in_flight = depths or (config.prefetch_depth(device.type), config.in_flight_depth(device.type))
        return replace(config, prefetch=prefetch if threaded else 0, in_flight=in_flight)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which becomes `path` in one step if that went well."""
    part = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _device_spans(recorded: list[Any], host: list[Span]) -> list[Span]:
    """The device's lanes. Work belongs to the batch that the main thread was at when it handed the work over.

    What Lightning asks of the device before the first batch is left out.
    """
    main = sorted((span for span in host if span.lane == Lane.MAIN), key=lambda span: span.start)
    starts = [span.start for span in main]
    spans = []
    for each in recorded:
        lane = _LANES.get(each.queue, Lane.DEVICE)
        stage = Stage.COMPILE if each.kind == "compile" else _STAGES[lane]
        place = bisect(starts, each.queued_at)
        if place and (batch := main[place - 1].batch) is not None:
            spans.append(Span(stage, lane, each.start, each.end, batch, each.nbytes))
    return spans
