"""`trace=`: spans of every stage of every batch, and what a run leaves behind."""

import json
import logging
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from lightning_hpu_infer.observe import chrome, run
from lightning_hpu_infer.observe.report import Report
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import Lane, Stage
from tests.helpers import ALL_OFF, Broken, BrokenStep, HookLog, Net, Writer, assert_equal, predict, rows, trainer
from tests.observe.simulate import printed

BATCHES = 6
FILES = {"trace.json", "report.json", "timeline.png", "timeline.svg"}


class Prepares(Net):
    """Works on each batch before it is copied."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch + 1


def traced(folder: Path, net: type[Net] = Prepares, **flags: Any) -> tuple[list[Span], Report]:
    """Spans and report of a run whose predictions equal stock's."""
    accelerator = HPUInferenceAccelerator(trace=folder, **flags)
    expected = predict("cpu", net(), rows(2 * BATCHES, 2))
    assert_equal(predict(accelerator, net(), rows(2 * BATCHES, 2), callbacks=[HookLog()]), expected)
    assert {path.name for path in folder.iterdir()} == FILES
    spans, about = chrome.read(folder / "trace.json")
    assert accelerator.report is not None
    assert Report.from_json((folder / "report.json").read_text()) == accelerator.report
    assert about["report"] == json.loads(accelerator.report.to_json())
    return spans, accelerator.report


def stages(spans: list[Span], lane: Lane, batch: int) -> list[Stage]:
    """What a lane did for a batch, in order of time, inner spans behind their outer ones."""
    found = [span for span in spans if span.lane == lane and span.batch == batch]
    return [span.stage for span in sorted(found, key=lambda span: (span.start, -span.end))]


@pytest.mark.smoke
@pytest.mark.usefixtures("emulated")
def test_every_stage_of_every_batch_is_recorded(tmp_path: Path) -> None:
    # Asked for: by itself no batch is prepared ahead of a module that works on each before its copy.
    spans, report = traced(tmp_path, defer_hooks=True, prefetch=2)
    for batch in range(BATCHES):
        assert stages(spans, Lane.PREFETCH, batch) == [Stage.FETCH, Stage.PREPARE, Stage.PIN]
        # The first replay is verified, so it lies within a span of capture.
        first: dict[int, list[Stage]] = {0: [], 1: [Stage.TRACE, Stage.CAPTURE], 2: [Stage.CAPTURE, Stage.REPLAY]}
        network = first.get(batch, [Stage.REPLAY])
        # TorchDynamo is asked for each frame.
        inner = [stage for stage, _ in groupby(stages(spans, Lane.MAIN, batch)) if stage != Stage.WAIT_INPUT]
        assert inner == [
            Stage.COPY_IN,
            Stage.START_HOOKS,
            Stage.LAUNCH,
            *network,
            Stage.WAIT_OUTPUT,
            Stage.COPY_OUT,
            Stage.END_HOOKS,
        ]
    assert (report.batches, report.measured_on) == (BATCHES, "emulated HPU")
    counters = report.counters
    assert (counters.captures, counters.replays, counters.plain_calls, counters.verified) == (1, 4, 1, 2)


@pytest.mark.smoke
@pytest.mark.usefixtures("emulated")
def test_in_stock_order_all_stages_are_the_main_threads(tmp_path: Path) -> None:
    spans, _ = traced(tmp_path, **ALL_OFF)
    assert {span.lane for span in spans if span.lane == Lane.PREFETCH} == set()
    for batch in range(BATCHES):
        assert stages(spans, Lane.MAIN, batch) == [
            Stage.FETCH,
            Stage.PREPARE,
            Stage.COPY_IN,
            Stage.START_HOOKS,
            Stage.LAUNCH,
            Stage.END_HOOKS,
            Stage.WAIT_OUTPUT,
            Stage.COPY_OUT,
        ]


@pytest.mark.usefixtures("emulated")
def test_the_devices_work_belongs_to_the_batch_that_was_launched(tmp_path: Path) -> None:
    spans, report = traced(tmp_path, **(ALL_OFF | {"pipelining": True}))
    stats = emulator.stats()
    copies = [span for span in spans if span.lane == Lane.H2D]
    # One input per batch; what Lightning asks of the device before the first batch is no part of it.
    assert Counter(span.batch for span in copies) == dict.fromkeys(range(BATCHES), 1)
    assert {span.nbytes for span in copies} == {2 * 4 * 4}
    assert {span.batch for span in spans if span.lane == Lane.DEVICE} == set(range(BATCHES))
    # `HookLog` reads each batch on the host too.
    assert {span.batch for span in spans if span.lane == Lane.D2H} == set(range(BATCHES))
    assert report.device is not None
    assert report.device.busy <= stats.busy_s


def test_a_stage_without_work_has_no_spans(tmp_path: Path) -> None:
    """Nothing of the user's runs before the copy, and on the CPU there is no copy."""
    spans, _ = traced(tmp_path, net=Net, prefetch=0)
    for batch in range(BATCHES):
        assert stages(spans, Lane.MAIN, batch) == [Stage.FETCH, Stage.START_HOOKS, Stage.LAUNCH, Stage.END_HOOKS]


def test_a_users_transfer_hook_is_recorded_on_the_cpu_too(tmp_path: Path) -> None:
    class Moves(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + 1

    spans, _ = traced(tmp_path, net=Moves, prefetch=0)
    assert [span.batch for span in spans if span.stage == Stage.COPY_IN] == list(range(BATCHES))


def test_on_the_cpu_there_are_host_lanes_only(tmp_path: Path) -> None:
    spans, report = traced(tmp_path, prefetch=2)
    assert {span.lane for span in spans} == {Lane.MAIN, Lane.PREFETCH}
    assert (report.device, report.measured_on) == (None, "cpu")


def test_batches_are_counted_over_all_dataloaders(tmp_path: Path) -> None:
    accelerator = HPUInferenceAccelerator(trace=tmp_path)
    predict(accelerator, Net(), [rows(4, 2), rows(6, 2)])
    spans, _ = chrome.read(tmp_path / "trace.json")
    assert [span.batch for span in spans if span.stage == Stage.LAUNCH] == list(range(5))
    # The fetch that finds the end belongs to no batch.
    assert [span.batch for span in spans if span.stage == Stage.FETCH] == [*range(5), None]


@pytest.mark.usefixtures("emulated")
def test_a_trace_changes_no_hook_and_no_writer(tmp_path: Path) -> None:
    for flags in (ALL_OFF, {}):
        seen = []
        for trace in (None, tmp_path):
            log, writer = HookLog(), Writer("batch_and_epoch")
            predict(HPUInferenceAccelerator(trace=trace, **flags), Net(), rows(7, 2), callbacks=[log, writer])
            seen.append((log.calls, [each[:3] for each in writer.batches], writer.epoch[1]))
        assert seen[0] == seen[1]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("flags", [{}, ALL_OFF, {"pipelining": "auto"}], ids=str)
def test_rule_11_a_run_that_fails_keeps_its_trace_and_says_so(flags: dict[str, Any], tmp_path: Path) -> None:
    accelerator = HPUInferenceAccelerator(trace=tmp_path / "new", **flags)
    ours = trainer(accelerator)
    with pytest.raises(Broken):
        ours.predict(BrokenStep(), rows(20, 2))
    assert {path.name for path in (tmp_path / "new").iterdir()} == FILES
    report = Report.from_json((tmp_path / "new" / "report.json").read_text())
    assert accelerator.report == report
    assert (report.batches, report.error) == (5, "Broken: step 4")
    assert (report.counters.captures > 0) == (flags != ALL_OFF)
    assert "ended early by Broken: step 4" in printed(report)
    spans, _ = chrome.read(tmp_path / "new" / "trace.json")
    assert [span.batch for span in spans if span.stage == Stage.LAUNCH] == list(range(5))
    ours.predict(Net(), rows(4, 2))
    assert accelerator.report.batches == 2
    assert accelerator.report.error == ""


@pytest.mark.usefixtures("emulated")
def test_rule_11_a_run_that_fails_is_remembered_for_its_error_and_not_for_the_disks(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(Broken):
        predict(HPUInferenceAccelerator(trace=file), BrokenStep(), rows(20, 2))


def test_rule_11_a_run_that_fails_before_its_first_batch_has_no_report(tmp_path: Path) -> None:
    class Empty(Net):
        def on_predict_start(self) -> None:
            raise Broken("start")

    accelerator = HPUInferenceAccelerator(trace=tmp_path)
    with pytest.raises(Broken):
        predict(accelerator, Empty(), rows(4, 2))
    assert accelerator.report is None
    assert list(tmp_path.iterdir()) == []


def test_a_picture_is_named_only_if_it_was_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    predict(HPUInferenceAccelerator(trace=tmp_path / "drawn"), Net(), rows(4, 2))
    assert "drawn: trace.json (for ui.perfetto.dev), report.json, timeline.png." in caplog.text
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="There is no timeline picture without matplotlib"):
        predict(HPUInferenceAccelerator(trace=tmp_path / "bare"), Net(), rows(4, 2))
    assert "bare: trace.json (for ui.perfetto.dev), report.json.\n" in caplog.text
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"trace.json", "report.json"}


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = HPUInferenceAccelerator(trace=tmp_path)
    predict(accelerator, Net(), rows(4, 2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(spans: Any, path: Path, about: Any) -> None:
        path.write_text('{"traceEvents": [')
        raise OSError("disk full")

    monkeypatch.setattr(chrome, "write", half)
    with pytest.warns(UserWarning, match="could not be written to .*disk full"):
        predict(accelerator, Net(), rows(8, 2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_predictions_outlive_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    accelerator = HPUInferenceAccelerator(trace=file)
    with pytest.warns(UserWarning, match=r"trace of this run could not be written to .*file: FileExistsError"):
        predictions = predict(accelerator, Net(), rows(4, 2))
    assert_equal(predictions, predict("cpu", Net(), rows(4, 2)))
    assert accelerator.report is not None


def test_without_a_batch_there_is_no_report(tmp_path: Path) -> None:
    accelerator = HPUInferenceAccelerator(trace=tmp_path)
    predict(accelerator, Net(), rows(4, 2), limit_predict_batches=0)
    assert accelerator.report is None
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_nothing_is_recorded() -> None:
    accelerator = HPUInferenceAccelerator()
    predict(accelerator, Net(), rows(4, 2))
    assert accelerator.report is None


def test_a_folder_is_a_path() -> None:
    with pytest.raises(TypeError, match="`trace` must be a folder or None, got True"):
        HPUInferenceAccelerator(trace=True)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_pulls_its_batches_is_not_recorded(tmp_path: Path) -> None:
    class Pulls(Net):
        def predict_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return self.net(batch)

    accelerator = HPUInferenceAccelerator(trace=tmp_path)
    with pytest.warns(UserWarning, match="`trace` has no effect: `predict_step` fetches its batches itself"):
        predictions = predict(accelerator, Pulls(), DataLoader(list(rows(4, 2)), batch_size=None))  # type: ignore[arg-type]
    assert len(predictions) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("emulated")
def test_the_trace_opens_in_perfetto(tmp_path: Path) -> None:
    """Its format: complete events with microseconds, and names for the lanes."""
    traced(tmp_path)
    document = json.loads((tmp_path / "trace.json").read_text())
    events = document["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {lane.value for lane in Lane} <= names
