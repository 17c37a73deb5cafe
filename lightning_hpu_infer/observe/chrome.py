"""Spans as a Chrome trace file, which Perfetto (https://ui.perfetto.dev) and `chrome://tracing` open, and back."""

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_hpu_infer.observe.spans import HOST_LANES, Span, in_rows
from lightning_hpu_infer.observer import Lane, Stage

_PRODUCER = "lightning_hpu_infer"
_PLACES = {lane: (1 if lane in HOST_LANES else 2, tid) for tid, lane in enumerate(Lane, 1)}
"""Process (1 is the host) and thread of each lane, as a viewer orders them. The last lane may have more threads."""


class TraceFileError(ValueError):
    """A file is not a trace, or a damaged one. The message names the file."""


def write(spans: Iterable[Span], path: str | PathLike[str], about: Mapping[str, Any] | None = None) -> None:
    """Write a trace file, gzipped if its name ends with `.gz`.

    Args:
        spans: In any order.
        path: The file, which is replaced if it exists.
        about: What else to keep in the file, as JSON values: `read` returns it.
    """
    events = [_name("process", (1, 0), "host"), _name("process", (2, 0), "device")]
    events += [_name("thread", place, lane.value) for lane, place in _PLACES.items()]
    spans = list(spans)
    rows = dict(in_rows(span for span in spans if span.lane == Lane.POSTPROCESS))
    events += [_event(span, rows.get(span, 0)) for span in spans]
    document = {"traceEvents": events, "otherData": {"producer": _PRODUCER, "about": dict(about or {})}}
    data = json.dumps(document, separators=(",", ":")).encode()
    Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)


def read(path: str | PathLike[str]) -> tuple[list[Span], dict[str, Any]]:
    """The spans of a file that `write` made, in the order written, and its `about`.

    Raises:
        OSError: If the file cannot be read.
        TraceFileError: If it is not such a file.
    """
    return from_chrome(load(path), path)


def load(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON object of any Chrome trace file, gzipped or not.

    Raises:
        OSError: If the file cannot be read.
        TraceFileError: If it is not a Chrome trace.
    """
    data = Path(path).read_bytes()
    try:
        document = json.loads(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise TraceFileError(f"{path} is not a Chrome trace: it is not JSON ({error}).") from error
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        raise TraceFileError(f'{path} is not a Chrome trace: it has no list "traceEvents".')
    return document


def is_ours(document: Mapping[str, Any]) -> bool:
    """Whether `write` made the trace that `load` returned."""
    other = document.get("otherData")
    return isinstance(other, dict) and other.get("producer") == _PRODUCER


def from_chrome(document: Mapping[str, Any], path: str | PathLike[str]) -> tuple[list[Span], dict[str, Any]]:
    """The spans and the `about` of a document that `load` read from `path`.

    Raises:
        TraceFileError: If another program wrote it, or it is damaged.
    """
    if not is_ours(document):
        raise TraceFileError(f"{path} is a Chrome trace of another program.")
    lanes = {place: lane for lane, place in _PLACES.items()}
    try:
        spans = [_span(event, lanes) for event in document["traceEvents"] if event["ph"] == "X"]
        return spans, dict(document["otherData"]["about"])
    except (KeyError, TypeError, ValueError) as error:
        raise TraceFileError(f"{path} is damaged ({type(error).__name__}: {error}): record it again.") from error


def _name(kind: str, place: tuple[int, int], name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{kind}_name", "pid": place[0], "tid": place[1], "args": {"name": name}}


def _event(span: Span, row: int) -> dict[str, Any]:
    # Viewers read microseconds, from which the seconds would come back slightly different.
    args = {"start_s": span.start, "end_s": span.end, "batch": span.batch, "bytes": span.nbytes}
    pid, tid = _PLACES[span.lane]
    place = {"pid": pid, "tid": tid + row, "ts": span.start * 1e6, "dur": span.seconds * 1e6}
    return {"ph": "X", "name": span.stage.value, "cat": span.lane.value, **place, "args": args}


def _span(event: Mapping[str, Any], lanes: Mapping[tuple[int, int], Lane]) -> Span:
    args, lane = event["args"], lanes[event["pid"], min(event["tid"], len(Lane))]
    if not -math.inf < args["start_s"] <= args["end_s"] < math.inf:
        raise ValueError(f"a span from {args['start_s']} to {args['end_s']} s")
    return Span(Stage(event["name"]), lane, args["start_s"], args["end_s"], args["batch"], args["bytes"])
