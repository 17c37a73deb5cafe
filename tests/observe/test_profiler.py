"""`diagnose`: traces of PyTorch's profiler and of this package, and the command."""

import gc
import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from lightning_hpu_infer import cli
from lightning_hpu_infer.cli import main
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe import chrome
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.profiler import diagnose, from_profiler
from lightning_hpu_infer.observe.report import Report, Verdict
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import Lane, Stage
from tests.helpers import Rows
from tests.observe.simulate import Times, pipelined

SPANS = pipelined(10, Times({Stage.FETCH: 12, Stage.LAUNCH: 1, Stage.DEVICE: 4}))
REPORT = analyse(SPANS, config=InferenceConfig(), measured_on="emulated HPU")


def event(
    cat: str, name: str, start: float, end: float, pid: object = 7, tid: object = 7, **args: Any
) -> dict[str, Any]:
    """A complete event; milliseconds."""
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": start * 1e3,
        "dur": (end - start) * 1e3,
        "args": args,
    }


def named(kind: str, pid: object, name: str, tid: object = 0) -> dict[str, Any]:
    return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def in_ms(spans: list[Span]) -> list[tuple[Stage, Lane, float, float, int | None]]:
    return [(s.stage, s.lane, round(s.start * 1e3, 6), round(s.end * 1e3, 6), s.batch) for s in spans]


def cuda_trace(batches: int = 5) -> dict[str, Any]:
    """Stock order: fetch 6, copy in 1, launch 1, kernels 2, wait and copy out; 12 ms per batch."""
    events = [
        named("process", 7, "python"),
        {"ph": "M", "name": "process_labels", "pid": 0, "tid": 0, "args": {"labels": "GPU 0"}},
        event("Trace", "PyTorch Profiler (0)", 0, 999, pid="Spans", tid="PyTorch Profiler"),
        {"ph": "i", "name": "Iteration Start: PyTorch Profiler", "ts": 0, "pid": "Traces", "tid": 0, "s": "g"},
    ]
    for k in range(batches):
        t = 12.0 * k
        events += [
            event("user_annotation", f"ProfilerStep#{k}", t, t + 12),
            event("user_annotation", "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", t, t + 6),
            event("cpu_op", "aten::stack", t + 1, t + 2),  # of the collate function
            event("cpu_op", "aten::to", t + 6, t + 7),
            event("cpu_op", "aten::copy_", t + 6, t + 7),
            event("cuda_runtime", "cudaMemcpyAsync", t + 6.5, t + 7, correlation=10 * k),
            event(
                "gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", t + 6.6, t + 7, 0, 7, correlation=10 * k, bytes=4000
            ),
            event("cpu_op", "aten::linear", t + 7, t + 8),
            event("cuda_runtime", "cudaLaunchKernel", t + 7.5, t + 8, correlation=10 * k + 1),
            event("kernel", "sgemm", t + 8, t + 10, 0, 7, correlation=10 * k + 1),
            event("gpu_user_annotation", f"ProfilerStep#{k}", t + 6, t + 12, 0, 7),
            event("cpu_op", "aten::to", t + 8, t + 11),
            event("cuda_runtime", "cudaMemcpyAsync", t + 8.1, t + 8.2, correlation=10 * k + 2),
            event("cuda_runtime", "cudaStreamSynchronize", t + 8.2, t + 11),
            event(
                "gpu_memcpy",
                "Memcpy DtoH (Device -> Pageable)",
                t + 10,
                t + 11,
                0,
                7,
                correlation=10 * k + 2,
                bytes=800,
            ),
        ]
    return {"traceEvents": events, "deviceProperties": [{"id": 0, "name": "NVIDIA A100"}]}


def hpu_trace(batches: int = 5) -> dict[str, Any]:
    """As the bridge's sources write it; the host launches for 5 of 8 ms, while the device is idle."""
    events = [
        named("process", 7, "python"),
        named("process", 0, "HPU"),
        named("thread", 0, "MME 0", 6001),
        named("thread", 0, "TPC 3", 7004),
        named("thread", 0, "PDMA 1", 3002),
        named("process", 5, "Synapse"),
        named("thread", 5, "Synapse/7", 7),
        named("process", 1000007, "Synapse Logger"),
    ]
    for k in range(batches):
        t = 8.0 * k
        events += [
            event("cpu_op", "aten::linear", t, t + 5),
            event("hpu_op", "LaunchSyncTensorsGraph", t + 4, t + 5, 1000007, 7),
            event("hpu_op", "synMemCopyAsync", t + 0.2, t + 0.3, 1000007, 7),
            event("hpu_op", "enqueueWithExternalEvents", t + 4.5, t + 4.8, 5, 7),
            event("hpu_op", "dma", t + 0.3, t + 0.8, 0, 3002, direction="HOST_TO_DRAM"),
            event("hpu_op", "dma", t + 0.8, t + 0.9, 0, 3002),  # who knows in which direction
            event("kernel", "GEMM", t + 5, t + 7, 0, 6001),
            event("kernel", "add_f32", t + 6, t + 7.5, 0, 7004),
            event("hpu_op", "synEventSynchronize", t + 5, t + 7.9, 1000007, 7),
            event("privateuse1_runtime", "LaunchRecipeTask", t + 4.2, t + 4.4),
            event("gpu_memcpy", "memcpy_D2H", t + 7.5, t + 7.9, 0, 3002),
        ]
    return {"traceEvents": events}


def test_a_cuda_trace() -> None:
    spans, measured_on = from_profiler(cuda_trace())
    assert measured_on == "NVIDIA A100"
    ours = [span for span in in_ms(spans) if span[4] == 1]
    assert sorted(ours, key=lambda span: (list(Lane).index(span[1]), span[2], -span[3])) == [
        (Stage.FETCH, Lane.MAIN, 12, 18, 1),
        (Stage.LAUNCH, Lane.MAIN, 18, 19, 1),
        (Stage.COPY_IN, Lane.MAIN, 18.5, 19, 1),
        (Stage.LAUNCH, Lane.MAIN, 19, 20, 1),
        (Stage.LAUNCH, Lane.MAIN, 20, 23, 1),
        (Stage.COPY_OUT, Lane.MAIN, 20.1, 20.2, 1),
        (Stage.WAIT_OUTPUT, Lane.MAIN, 20.2, 23, 1),
        (Stage.H2D, Lane.H2D, 18.6, 19, 1),
        (Stage.DEVICE, Lane.DEVICE, 20, 22, 1),
        (Stage.D2H, Lane.D2H, 22, 23, 1),
    ]
    report = analyse(spans, measured_on=measured_on)
    assert report.verdict == Verdict.INPUT
    assert report.batches == 5
    assert {time.lane: time.nbytes for time in report.stages if time.nbytes} == {Lane.H2D: 20000, Lane.D2H: 4000}
    causes = {cause.stage: cause.seconds for cause in report.causes}
    assert causes[Stage.FETCH] == pytest.approx(4 * 6e-3)
    assert causes[Stage.D2H] == pytest.approx(4 * 1e-3)


def test_an_hpu_trace() -> None:
    spans, measured_on = from_profiler(hpu_trace())
    report = analyse(spans, measured_on=measured_on)
    assert report.verdict == Verdict.LAUNCH
    assert report.device is not None
    assert report.device.busy == pytest.approx(5 * 2.5e-3)
    assert report.device.idle == pytest.approx(4 * 5.5e-3)
    causes = {cause.stage: cause.seconds for cause in report.causes}
    assert causes[Stage.LAUNCH] == pytest.approx(4 * 5e-3)
    assert causes[Stage.D2H] == pytest.approx(4 * 0.4e-3)
    lanes = [span.lane for span in spans]
    assert lanes.count(Lane.H2D) == 5
    assert lanes.count(Lane.D2H) == 5
    assert lanes.count(Lane.DEVICE) == 10
    assert measured_on == "HPU"
    assert "`hpu_graphs=True`" in report.advice


def test_a_prefetching_thread_and_the_names_of_lightnings_profiler() -> None:
    prefix = "[pl][profile]"
    events = [
        event("cpu_op", "aten::linear", 10, 12),
        event("user_annotation", f"{prefix}[_PredictionLoop].predict_next", 0, 8, tid=8),
        event("user_annotation", f"{prefix}[LightningModule]Net.on_before_batch_transfer", 8, 9, tid=8),
        event("cpu_op", "aten::relu", 8, 9, tid=8),
        event("cpu_op", "aten::pin_memory", 9, 10, tid=8),
        event("user_annotation", f"{prefix}[Strategy]SingleDeviceStrategy.batch_to_device", 10, 10.5),
        event("user_annotation", f"{prefix}[Callback]Bar.on_predict_batch_start", 10.5, 11),
        event("user_annotation", f"{prefix}[Strategy]SingleDeviceStrategy.predict_step", 12, 13),
        event("user_annotation", f"{prefix}[Callback]Writer.on_predict_batch_end", 13, 15),
        event("cpu_op", "aten::item", 13, 14),
        event("python_function", "model.py(3): forward", 16, 17),
    ]
    spans, measured_on = from_profiler({"traceEvents": events})
    assert measured_on == "cpu"
    assert {(span[0], span[1], span[2], span[3]) for span in in_ms(spans)} == {
        (Stage.FETCH, Lane.PREFETCH, 0, 8),
        (Stage.PREPARE, Lane.PREFETCH, 8, 9),
        (Stage.PIN, Lane.PREFETCH, 9, 10),
        (Stage.LAUNCH, Lane.MAIN, 10, 12),
        (Stage.COPY_IN, Lane.MAIN, 10, 10.5),
        (Stage.START_HOOKS, Lane.MAIN, 10.5, 11),
        (Stage.LAUNCH, Lane.MAIN, 12, 13),
        (Stage.END_HOOKS, Lane.MAIN, 13, 15),
        (Stage.WAIT_OUTPUT, Lane.MAIN, 13, 14),
        (Stage.LAUNCH, Lane.MAIN, 16, 17),
    }


def test_a_real_trace_of_the_profiler(tmp_path: Path) -> None:
    network = torch.nn.Linear(4, 4)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.inference_mode():
        for batch in DataLoader(Rows(10), batch_size=2):
            network(batch).sum().item()
            profiler.step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    (tmp_path / "trace.json.gz").write_bytes(gzip.compress((tmp_path / "trace.json").read_bytes()))
    for name in ("trace.json", "trace.json.gz"):
        spans, report = diagnose(tmp_path / name)
        assert report.batches == 5
        assert report.measured_on == "cpu"
        assert report.device is None
        assert {Stage.FETCH, Stage.LAUNCH, Stage.WAIT_OUTPUT} == {span.stage for span in spans}
        assert {span.lane for span in spans} == {Lane.MAIN}


def test_a_trace_is_read_once_so_it_may_come_through_a_pipe(tmp_path: Path) -> None:
    chrome.write(SPANS, tmp_path / "trace.json", {"report": REPORT.as_dict()})
    data = (tmp_path / "trace.json").read_bytes()
    for content in (data, gzip.compress(data)):
        read, write = os.pipe()
        os.write(write, content)
        os.close(write)
        assert diagnose(f"/dev/fd/{read}") == (SPANS, REPORT)
        os.close(read)


def test_our_own_trace_keeps_its_report(tmp_path: Path) -> None:
    chrome.write(SPANS, tmp_path / "trace.json", {"report": REPORT.as_dict()})
    assert diagnose(tmp_path / "trace.json") == (SPANS, REPORT)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"report": None},
        {"report": {"of": "another version"}},
        {"report": REPORT.as_dict() | {"counters": {"of": "another version"}}},
        {"report": REPORT.as_dict() | {"stages": ["of another version"]}},
    ],
)
def test_a_report_that_is_none_is_made_anew(tmp_path: Path, about: dict[str, Any]) -> None:
    chrome.write(SPANS, tmp_path / "trace.json", about)
    assert diagnose(tmp_path / "trace.json") == (SPANS, analyse(SPANS))


def test_the_command_prints_plots_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, plot, report = (str(tmp_path / name) for name in ("trace.json", "run.png", "report.json"))
    chrome.write(SPANS, trace, {"report": REPORT.as_dict()})
    assert main(["diagnose", trace, "--plot", plot, "--json", report]) == 0
    assert "input-bound (high)" in capsys.readouterr().out
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    assert Report.from_json(Path(report).read_text()) == REPORT
    assert main(["diagnose", trace, "--json", "-"]) == 0
    assert Report.from_json(capsys.readouterr().out) == REPORT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no trace", "is not JSON"),
        (b'{"traceEvents": []}', "has no event"),
        (b'{"traceEvents": [{"ph": "X", "cat": "odd", "name": "a", "ts": 0, "dur": 1}]}', "has no event"),
        (gzip.compress(b"[1, 2]", mtime=0), 'has no list "traceEvents"'),
        (b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "a", "ts": 0}]}', "is damaged (KeyError: 'dur')"),
        (b'{"traceEvents": [], "otherData": {"producer": "lightning_hpu_infer", "about": {}}}', "has no event"),
        (b'{"traceEvents": [{}], "otherData": {"producer": "lightning_hpu_infer", "about": {}}}', "is damaged"),
        (None, "No such file"),
    ],
)
def test_wrong_files_are_one_clear_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "trace.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["diagnose", str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error
    assert str(path) in error


def test_mistakes_in_options_are_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = str(tmp_path / "trace.json")
    chrome.write(SPANS, trace)
    assert main(["diagnose", trace, "--plot", str(tmp_path / "run.png"), "--first", "99"]) == 2
    assert "no batch 99" in capsys.readouterr().err
    assert main(["diagnose", trace, "--plot", str(tmp_path / "none" / "run.png")]) == 2
    assert main(["diagnose", trace, "--plot", str(tmp_path / "run.odd")]) == 2
    for wrong in ([], ["cure"], ["diagnose"]):
        with pytest.raises(SystemExit) as left:
            main(wrong)
        assert left.value.code == 2


def test_an_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []

    def interrupted(path: str) -> None:
        collected.append(gc.isenabled())
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "diagnose", interrupted)
    assert main(["diagnose", "trace.json"]) == 130
    assert [*collected, gc.isenabled()] == [False, True]


def test_python_dash_m(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_hpu_infer", "diagnose", str(tmp_path / "none.json")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "No such file" in run.stderr
    assert "Traceback" not in run.stderr
