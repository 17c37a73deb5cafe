"""Spans as a Chrome trace file, which Perfetto (https://ui.perfetto.dev) and `chrome://tracing` open, and back."""

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_hpu_infer.observe.spans import Lane, Span, Stage

_PRODUCER = "lightning_hpu_infer"
_HOST, _DEVICE = 1, 2
_LANES = {
    lane: (_HOST if lane in (Lane.PREFETCH, Lane.MAIN) else _DEVICE, number) for number, lane in enumerate(Lane, 1)
}
_PROCESSES = {_HOST: "host", _DEVICE: "device"}
_GZIP_MAGIC = b"\x1f\x8b"
_MOST_SECONDS, _MOST_BYTES = 1e15, 2**63
"""More than any clock or memory has, and so little that sums do not overflow."""


class TraceFileError(ValueError):
    """A file is not the trace that it was taken for. Its message names the file."""


def write(spans: Iterable[Span], path: str | PathLike[str], about: Mapping[str, Any] | None = None) -> None:
    """Write a trace file; gzipped if the name ends with `.gz`.

    Args:
        spans: In any order.
        path: The file, which is replaced if it exists.
        about: What else to keep in the file, as JSON values: `read` returns it.
    """
    text = json.dumps(to_chrome(spans, about), separators=(",", ":")).encode()
    Path(path).write_bytes(gzip.compress(text) if str(path).endswith(".gz") else text)


def read(path: str | PathLike[str]) -> tuple[list[Span], dict[str, Any]]:
    """The spans of a file that `write` made, in the order written, and what it was told about them.

    Raises:
        OSError: If the file cannot be read.
        TraceFileError: If it is no such file.
    """
    document = load(path)
    if not is_ours(document):
        raise TraceFileError(f"{path} is a Chrome trace of another program.")
    return unpack(document, path)


def unpack(document: Mapping[str, Any], path: str | PathLike[str]) -> tuple[list[Span], dict[str, Any]]:
    """As `read`, from what `load` gave for `path` and `is_ours`.

    Raises:
        TraceFileError: If it is damaged.
    """
    try:
        return from_chrome(document)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TraceFileError(f"{path} is damaged ({type(error).__name__}: {error}): record it again.") from error


def load(path: str | PathLike[str]) -> dict[str, Any]:
    """Any Chrome trace file, gzipped or not, as the object that has `traceEvents`.

    Raises:
        OSError: If the file cannot be read.
        TraceFileError: If it holds no Chrome trace.
    """
    data = Path(path).read_bytes()
    try:
        if data.startswith(_GZIP_MAGIC):
            data = gzip.decompress(data)
        text = data.decode(json.detect_encoding(data))
        del data  # as large as the text, and some traces are a good part of the memory
        document = json.loads(text)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise TraceFileError(f"{path} is not a Chrome trace: it is not JSON ({error}).") from error
    except RecursionError as error:
        raise TraceFileError(f"{path} is not a Chrome trace: it is nested too deeply.") from error
    if isinstance(document, list):
        document = {"traceEvents": document}  # the format's short form
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        raise TraceFileError(f'{path} is not a Chrome trace: it has no list "traceEvents".')
    return document


def is_ours(document: Mapping[str, Any]) -> bool:
    """Whether a loaded trace was written by `write`."""
    other = document.get("otherData")
    return isinstance(other, dict) and other.get("producer") == _PRODUCER


def to_chrome(spans: Iterable[Span], about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Spans in Chrome's trace format: one process for the host and one for the device, one thread per `Lane`."""
    names = [_name("process", pid, 0, name, pid) for pid, name in _PROCESSES.items()]
    names += [_name("thread", pid, tid, lane.value, tid) for lane, (pid, tid) in _LANES.items()]
    return {
        "traceEvents": [event for pair in names for event in pair] + [_event(span) for span in spans],
        "displayTimeUnit": "ms",
        "otherData": {"producer": _PRODUCER, "about": dict(about or {})},
    }


def from_chrome(document: Mapping[str, Any]) -> tuple[list[Span], dict[str, Any]]:
    """What `to_chrome` was given.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: If it is no such document.
    """
    lanes = {place: lane for lane, place in _LANES.items()}
    spans = [_span(event, lanes) for event in document["traceEvents"] if event["ph"] == "X"]
    return spans, dict(document["otherData"]["about"])


def check_measures(start: float, end: float, nbytes: int) -> None:
    """Refuse what can be no span's, such as the NaN and Infinity that Python reads in JSON.

    Raises:
        ValueError: If the seconds are not in order, or a number is out of all bounds.
    """
    if not -_MOST_SECONDS < start <= end < _MOST_SECONDS:  # nor is it if one is NaN
        raise ValueError(f"a span from {start} to {end} s")
    if not 0 <= nbytes < _MOST_BYTES:
        raise ValueError(f"a copy of {nbytes} bytes")


def _span(event: Mapping[str, Any], lanes: Mapping[tuple[int, int], Lane]) -> Span:
    args = event["args"]
    start, end = float(args["start_s"]), float(args["end_s"])
    batch, nbytes = args.get("batch"), args.get("bytes", 0)
    check_measures(start, end, nbytes)
    if not isinstance(batch, int | None) or not isinstance(nbytes, int):
        raise TypeError(f"batch {batch!r}, {nbytes!r} bytes")
    return Span(Stage(event["name"]), lanes[event["pid"], event["tid"]], start, end, batch, nbytes)


def _event(span: Span) -> dict[str, Any]:
    # Microseconds are what viewers read. They would not give back the very same seconds, so these are kept too.
    args: dict[str, Any] = {"start_s": span.start, "end_s": span.end}
    if span.batch is not None:
        args["batch"] = span.batch
    if span.nbytes:
        args["bytes"] = span.nbytes
    pid, tid = _LANES[span.lane]
    return {
        "ph": "X",
        "name": span.stage.value,
        "cat": span.lane.value,
        "pid": pid,
        "tid": tid,
        "ts": span.start * 1e6,
        "dur": span.seconds * 1e6,
        "args": args,
    }


def _name(kind: str, pid: int, tid: int, name: str, order: int) -> tuple[dict[str, Any], dict[str, Any]]:
    event = {"ph": "M", "pid": pid, "tid": tid}
    return (
        event | {"name": f"{kind}_name", "args": {"name": name}},
        event | {"name": f"{kind}_sort_index", "args": {"sort_index": order}},
    )
