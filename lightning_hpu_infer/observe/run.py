"""A traced run: from the first span to the files that show where its time went."""

import os
from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


class TracedRun:
    """Records one run on all of its lanes.

    The device's own lanes come from the emulator. On hardware the HPU profiler has them: give its trace to
    `python -m lightning_hpu_infer diagnose`.

    Args:
        config: The flags of the run. `trace` is the folder to write to.
        trainer: Whose run it is.
    """

    def __init__(self, config: InferenceConfig, trainer: Any) -> None:
        self.trace = Trace()
        self._config = config
        self._trainer = trainer
        self._on_hpu = trainer.strategy.root_device.type == _habana.DEVICE_TYPE
        self.spans: list[Span] = []

    def __enter__(self) -> "TracedRun":
        if self._on_hpu:
            _habana.start_timeline()
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_hpu:
            _habana.stop_timeline()

    def conclude(self, counters: Counters, depths: tuple[int, int] | None, tuning: Sequence[str]) -> None:
        """End the recording, leave the report with the accelerator, and write both to the folder.

        Whatever fails is a warning: predictions that may have taken hours are not lost for a full disk.

        Args:
            counters: What spans do not show.
            depths: `prefetch` and `in_flight` in the end, if they were not fixed.
            tuning: What was tried to find them, in words.
        """
        try:
            report = self.finish(counters, depths, tuning)
            if report is not None:
                self._trainer.accelerator.report = report
                folder = Path(self._config.trace or "")
                ranks = self._trainer.world_size
                self.write(report, folder / f"rank{self._trainer.global_rank}" if ranks > 1 else folder)
        except Exception as error:
            rank_zero_warn(f"The trace of this run could not be written to {self._config.trace}: {error!r}")

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
            setup=Setup(
                precision=str(self._trainer.precision),
                progress_bar=self._trainer.progress_bar_callback is not None,
                cores=os.cpu_count() or 0,
            ),
            counters=counters,
            measured_on=measured_on,
            tuning=tuning,
            truncated=len(self.spans) < len(spans),
        )

    def write(self, report: Report, folder: Path) -> None:
        """Write `trace.json` for Perfetto, `report.json`, and the timeline as `timeline.png` and `timeline.svg`.

        Raises:
            OSError: If the folder cannot be written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        chrome.write(self.spans, folder / "trace.json", {"report": report.as_dict()})
        (folder / "report.json").write_text(report.to_json())
        if find_spec("matplotlib") is None:
            rank_zero_warn("There is no timeline picture without matplotlib: pip install lightning-hpu-infer[plots]")
        else:
            from lightning_hpu_infer.observe import timeline as plots

            for suffix in ("png", "svg"):
                plots.timeline(self.spans, folder / f"timeline.{suffix}", title=report.summary)
        rank_zero_info(
            f"{report.summary}\n{report.advice}\nSee {folder}: trace.json (for ui.perfetto.dev), timeline.png."
        )

    def _as_it_ran(self, depths: tuple[int, int] | None, *, threaded: bool) -> InferenceConfig:
        """The flags with the depths that there were in the end: `prefetch` is 0 where no thread ran."""
        config, device = self._config, self._trainer.strategy.root_device
        prefetch, in_flight = depths or (config.prefetch_depth(device.type), config.in_flight_depth(device.type))
        return replace(config, prefetch=prefetch if threaded else 0, in_flight=in_flight)


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
