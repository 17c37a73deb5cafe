"""Chrome traces: what is written is read back, and damaged files are named."""

import gzip
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_hpu_infer.observe import chrome
from lightning_hpu_infer.observe.spans import HOST_LANES, Span
from lightning_hpu_infer.observer import Lane, Stage

seconds = st.floats(0, 1e9, allow_nan=False)
spans = st.builds(
    lambda stage, lane, start, duration, batch, nbytes: Span(stage, lane, start, start + duration, batch, nbytes),
    st.sampled_from(Stage),
    st.sampled_from(Lane),
    seconds,
    seconds,
    st.none() | st.integers(0, 10**9),
    st.integers(0, 2**50),
)
SPANS = [
    Span(Stage.FETCH, Lane.PREFETCH, 12345.678901234, 12345.6801, batch=0),
    Span(Stage.LAUNCH, Lane.MAIN, 12345.6801, 12345.6901, batch=0),
    Span(Stage.H2D, Lane.H2D, 12345.68015, 12345.6802, batch=0, nbytes=4096),
    Span(Stage.DEVICE, Lane.DEVICE, 12345.6803, 12345.69, batch=None),
]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(spans, max_size=20))
def test_what_is_read_back_is_equal(tmp_path_factory: pytest.TempPathFactory, written: list[Span]) -> None:
    path = tmp_path_factory.getbasetemp() / "trace.json"
    chrome.write(written, path, {"emulated": True})
    assert chrome.read(path) == (written, {"emulated": True})


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_files_are_gzipped_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    chrome.write(SPANS, path, {"batches": 1})
    assert path.read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")
    assert chrome.read(path) == (SPANS, {"batches": 1})


def test_a_viewer_finds_lanes_in_order_with_microseconds_and_args(tmp_path: Path) -> None:
    chrome.write(SPANS, tmp_path / "trace.json")
    events = chrome.load(tmp_path / "trace.json")["traceEvents"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    lanes = [*HOST_LANES, *(lane for lane in Lane if lane not in HOST_LANES)]
    assert [threads[place] for place in sorted(threads)] == [lane.value for lane in lanes]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["host", "device"]
    copy = next(event for event in events if event["name"] == Stage.H2D.value and event["ph"] == "X")
    assert math.isclose(copy["ts"], 12345.68015e6)
    assert math.isclose(copy["dur"], 50, rel_tol=1e-4)
    assert copy["args"].items() >= {"batch": 0, "bytes": 4096}.items()


def test_workers_at_once_have_a_thread_each(tmp_path: Path) -> None:
    starts = [(0.0, 4.0), (1.0, 2.0), (1.5, 3.0), (2.0, 5.0), (4.0, 6.0)]
    spans = [Span(Stage.POSTPROCESS, Lane.POSTPROCESS, *ends, batch) for batch, ends in enumerate(starts)]
    chrome.write(spans, tmp_path / "trace.json")
    events = [event for event in chrome.load(tmp_path / "trace.json")["traceEvents"] if event["ph"] == "X"]
    first = events[0]["tid"]
    assert [(event["pid"], event["tid"] - first) for event in events] == [(1, 0), (1, 1), (1, 2), (1, 1), (1, 0)]
    assert chrome.read(tmp_path / "trace.json")[0] == spans


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no json", "not JSON"),
        (b"\x80\x81", "not JSON"),
        (b"\x1f\x8b broken", "not JSON"),
        (gzip.compress(b"{}", mtime=0)[:-9], "not JSON"),
        (gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 9, "not JSON"),
        (b"{}", 'no list "traceEvents"'),
        (b'{"traceEvents": {}}', 'no list "traceEvents"'),
        (b"3", 'no list "traceEvents"'),
        (b"[]", 'no list "traceEvents"'),
        (b'{"traceEvents": []}', "of another program"),
        (b'{"traceEvents": [{"ph": "X"}], "otherData": {"producer": "lightning_hpu_infer"}}', "damaged"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(chrome.TraceFileError, match=message) as error:
        chrome.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"pid": 3},
        {"name": "of another version"},
        {"args": []},
        {"args": {"start_s": math.nan, "end_s": 1, "batch": None, "bytes": 0}},
        {"args": {"start_s": 1, "end_s": 0, "batch": None, "bytes": 0}},
        {"args": {"start_s": 0, "end_s": "soon", "batch": None, "bytes": 0}},
    ],
    ids=lambda damage: str(damage)[:60],
)
def test_a_damaged_span_is_named(tmp_path: Path, damage: dict[str, object]) -> None:
    path = tmp_path / "trace.json"
    chrome.write(SPANS, path)
    document = chrome.load(path)
    document["traceEvents"][-1] |= damage
    path.write_text(json.dumps(document))
    with pytest.raises(chrome.TraceFileError, match=r"is damaged .*record it again"):
        chrome.read(path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        chrome.read(tmp_path / "none.json")
