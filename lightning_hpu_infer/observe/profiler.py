"""What limited a run that was recorded in a file: by this package, or by PyTorch's profiler on any device.

How a Gaudi's events look is read from the bridge's sources (`backend/profiling/`) and from scripts that read such
traces; no trace of a Gaudi was at hand.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from operator import attrgetter
from os import PathLike
from typing import Any, NamedTuple

from lightning_hpu_infer.observe import chrome
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.report import Report
from lightning_hpu_infer.observe.spans import Lane, Span, Stage


class Diagnosed(NamedTuple):
    """What `diagnose` found in a file."""

    spans: list[Span]
    report: Report
    skipped: int
    """Broken events that were left out."""


class Profiled(NamedTuple):
    """What `from_profiler` found in a trace."""

    spans: list[Span]
    measured_on: str
    """The device, as far as the trace tells."""
    skipped: int
    """Broken events that were left out."""


def diagnose(path: str | PathLike[str]) -> Diagnosed:
    """The spans of a file and what limited the run.

    Args:
        path: A trace of this package's, or a Chrome trace of PyTorch's profiler from a CPU, CUDA or HPU run; gzipped
            or not. It is read once, so it may be a pipe.

    Raises:
        OSError: If the file cannot be read.
        TraceFileError: If it is no such trace, or an empty one.
    """
    document = chrome.load(path)
    stored, measured_on, skipped = None, "", 0
    if chrome.is_ours(document):
        spans, about = chrome.unpack(document, path)
        stored = _stored_report(about)
    else:
        spans, measured_on, skipped = from_profiler(document)
    del document  # by far the largest of all that is made here
    if not spans:
        raise chrome.TraceFileError(f"{path} has no event of a host thread or a device: record at least one batch.")
    # A report made after the run knows its flags and counters, which spans do not tell.
    return Diagnosed(spans, stored or analyse(spans, measured_on=measured_on), skipped)


def _stored_report(about: Mapping[str, Any]) -> Report | None:
    try:
        report = Report.from_dict(about["report"])
        report.__rich__()  # what cannot be printed is no report, whatever its fields are called
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return None  # of another version, or none was made
    return report


class _Event(NamedTuple):
    name: str
    category: str
    thread: tuple[str, str]
    """Process and thread."""
    start: float
    end: float
    correlation: object
    """What an event of the device shares with the call that launched it."""
    nbytes: int
    words: str
    """All that may tell a copy's direction and an engine's kind, for events that may be either."""


_COMPUTE = {"kernel", "concurrent_kernel", "gpu_memset", "memset"}
_COPY = {"gpu_memcpy", "memcpy"}
_RUNTIME = {"cuda_runtime", "cuda_driver", "xpu_runtime", "privateuse1_runtime"}
_ASYNCHRONOUS = _RUNTIME | {"hpu_op"}
"""What only a run on a device has."""
_HOST = _RUNTIME | {"cpu_op", "user_annotation", "python_function", "runtime", "privateuse1_driver"}
_NOT_WORK = {"gpu_user_annotation", "cuda_sync", "xpu_sync", "overhead", "trace", "ac2g", "cpu_instant_event"}

_ENGINE = re.compile(r"\b(TPC|MME|[EK]?DMA|ROTATOR)", re.IGNORECASE)
_HOST_DMA = re.compile(r"\bPDMA", re.IGNORECASE)
"""The engine that copies between host and device."""
_TO_DEVICE = re.compile(r"HtoD|H2D|host[ _]?(to|->)[ _]?(d(ram|evice)|hbm)", re.IGNORECASE)
_TO_HOST = re.compile(r"DtoH|D2H|(dram|device|hbm)[ _]?(to|->)[ _]?host", re.IGNORECASE)
_DEVICE_PROCESS = re.compile(r"\b(GPU|HPU|XPU|Gaudi)", re.IGNORECASE)

_STEP = re.compile(r"ProfilerStep#")
_STAGES = [
    (re.compile(pattern), stage)
    for pattern, stage in (
        # Names are those of PyTorch, of Lightning's profiler actions and hooks, of CUDA and of Synapse.
        (r"enumerate\(DataLoader\)#|predict_next|dataloader\.py\(\d+\): __next__", Stage.FETCH),
        (r"on_before_batch_transfer|convert_input", Stage.PREPARE),
        (r"aten::_?pin_memory", Stage.PIN),
        (r"batch_to_device|on_after_batch_transfer", Stage.COPY_IN),
        (r"on_predict_batch_start", Stage.START_HOOKS),
        (r"on_predict_batch_end", Stage.END_HOOKS),
        (r"synGraphCompile", Stage.COMPILE),
        (r"aten::item$|aten::_local_scalar_dense|(Stream|Device|Event)Synchronize", Stage.WAIT_OUTPUT),
    )
]
_CLOSED = {Stage.FETCH, Stage.PREPARE, Stage.PIN, Stage.COPY_IN, Stage.COPY_OUT, Stage.WAIT_OUTPUT, Stage.COMPILE}
"""Stages that own what happens inside of them: the ops of a collate function launch nothing."""


def from_profiler(document: Mapping[str, Any]) -> Profiled:
    """Understand a Chrome trace of PyTorch's profiler."""
    names = _names(document["traceEvents"])
    events, skipped = _events(document["traceEvents"], names)
    device = [(event, lane) for event in events if (lane := _device_lane(event, names)) is not None]
    if device:
        # One process drives one device; others in the trace are other ranks' or unused.
        busiest = Counter(event.thread[0] for event, _ in device).most_common(1)[0][0]
        device = [(event, lane) for event, lane in device if event.thread[0] == busiest]
    on_device = {id(event) for event, _ in device}
    host = [event for event in events if _is_host(event) and id(event) not in on_device]
    main = _main_thread(host)
    # The bridge writes its own calls into a process of its own, under the same thread's number.
    batch_of = _batches([event for event in host if event.thread[1] == main])
    copies = {event.correlation: lane for event, lane in device if event.correlation is not None}
    spans = [*_host_spans(host, main, copies, batch_of), *_device_spans(device, host, batch_of)]
    return Profiled(spans, _measured_on(document, events, device), skipped)


def _names(events: Iterable[Any]) -> dict[tuple[str, str], str]:
    """What the trace calls its processes, with thread "", and its threads."""
    names: dict[tuple[str, str], str] = {}
    for event in events:
        if isinstance(event, dict) and event.get("ph") == "M" and isinstance(event.get("args"), dict):
            pid, args = _text(event.get("pid")), event["args"]
            if event.get("name") in ("process_name", "process_labels"):
                words = (names.get((pid, ""), ""), _text(args.get("name")), _text(args.get("labels")))
                names[pid, ""] = " ".join(filter(None, words))
            elif event.get("name") == "thread_name":
                names[pid, _text(event.get("tid"))] = _text(args.get("name"))
    return names


def _text(value: object) -> str:
    return str(value) if isinstance(value, (str, int, float)) else ""


def _events(events: Iterable[Any], names: Mapping[tuple[str, str], str]) -> tuple[list[_Event], int]:
    """The complete events in order of time, outer ones before those inside of them, and how many were broken."""
    found: list[_Event] = []
    skipped = 0
    threads = lru_cache(maxsize=None)(lambda pid, tid: (_text(pid), _text(tid)))
    for event in events:
        if isinstance(event, dict) and event.get("ph") != "X":
            continue
        try:
            found.append(_event(event, names, threads))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # AttributeError: no object at all
            skipped += 1
    # Two sorts by a number are much faster than one by a pair. The second leaves in order what begins together.
    found.sort(key=attrgetter("end"), reverse=True)
    found.sort(key=attrgetter("start"))
    return found, skipped


def _event(
    event: Mapping[str, Any],
    names: Mapping[tuple[str, str], str],
    thread_of: Callable[[Any, Any], tuple[str, str]],
) -> _Event:
    """Raises AttributeError, KeyError, TypeError, ValueError or OverflowError if the event is broken."""
    name, category = event.get("name", ""), _lower(event.get("cat", ""))
    if not isinstance(name, str):
        raise TypeError(f"the name {name!r}")
    thread = thread_of(event.get("pid"), event.get("tid"))
    start = float(event["ts"])
    end = (start + float(event["dur"])) / 1e6
    start /= 1e6
    args = event.get("args")
    if not isinstance(args, dict):
        args = {}
    nbytes = args.get("bytes", args.get("Bytes", 0))
    nbytes = int(float(nbytes)) if nbytes else 0
    chrome.check_measures(start, end, nbytes)
    correlation = args.get("correlation")
    hash(correlation)  # a TypeError if nothing can be looked up by it
    words = ""
    if category in _COPY or category == "hpu_op":
        said = (name, names.get(thread), args.get("HW event name"), args.get("direction"))
        words = " ".join(filter(None, map(_text, said)))
    return _Event(name, category, thread, start, end, correlation, nbytes, words)


_lower = lru_cache(maxsize=256)(str.lower)


def _device_lane(event: _Event, names: Mapping[tuple[str, str], str]) -> Lane | None:
    """Where an event of the device belongs; None for events of the host."""
    if event.category in _COPY or (event.category == "hpu_op" and _HOST_DMA.search(event.words)):
        if _TO_DEVICE.search(event.words):
            return Lane.H2D
        if _TO_HOST.search(event.words):
            return Lane.D2H
        # A copy inside of the device is its work; one of unknown direction says nothing.
        return None if _HOST_DMA.search(event.words) else Lane.DEVICE
    if event.category in _COMPUTE:
        return Lane.DEVICE
    thread = names.get(event.thread, "")
    if event.category == "hpu_op":
        return Lane.DEVICE if _ENGINE.search(event.words) and not thread.startswith("Synapse") else None
    known = event.category in _HOST or event.category in _NOT_WORK
    return Lane.DEVICE if not known and _DEVICE_PROCESS.search(names.get((event.thread[0], ""), "")) else None


def _is_host(event: _Event) -> bool:
    return event.category in _HOST or event.category == "hpu_op"


def _host_spans(
    host: list[_Event], main: str, copies: Mapping[object, Lane], batch_of: Callable[[float], int | None]
) -> Iterator[Span]:
    threads: dict[str, list[_Event]] = {}
    for event in host:
        if event.thread[1] == main or _stage(event, copies) in (Stage.FETCH, Stage.PREPARE, Stage.PIN):
            threads.setdefault(event.thread[1], []).append(event)
    for thread, events in threads.items():
        for stage, event in _staged(events, copies):
            if thread == main:
                yield Span(stage, Lane.MAIN, event.start, event.end, batch_of(event.start))
            else:
                yield Span(stage, Lane.PREFETCH, event.start, event.end)


def _main_thread(host: list[_Event]) -> str:
    """The thread that launches: the process's first one, or the one with most ops."""
    ops: Counter[str] = Counter()
    for event in host:
        if event.category == "cpu_op":
            ops[event.thread[1]] += 1
            if event.thread[0] == event.thread[1]:
                return event.thread[1]
    counted = ops or Counter(event.thread[1] for event in host)
    return counted.most_common(1)[0][0] if counted else ""


def _stage(event: _Event, copies: Mapping[object, Lane]) -> Stage | None:
    """What a host event was for; None says nothing."""
    stage = _stage_by_name(event.name)
    if stage == Stage.LAUNCH and event.category in _RUNTIME:
        copied = copies.get(event.correlation)
        if copied is not None and copied != Lane.DEVICE:
            return Stage.COPY_IN if copied == Lane.H2D else Stage.COPY_OUT
    return stage


@lru_cache(maxsize=4096)  # a trace has millions of events and few names
def _stage_by_name(name: str) -> Stage | None:
    if _STEP.search(name):
        return None
    return next((stage for pattern, stage in _STAGES if pattern.search(name)), Stage.LAUNCH)


def _staged(events: list[_Event], copies: Mapping[object, Lane]) -> Iterator[tuple[Stage, _Event]]:
    """The events of one thread that say something that those around them do not."""
    around: list[tuple[float, Stage]] = []
    for event in events:
        # A microsecond and a duration add up to an end that is a nanosecond off.
        while around and around[-1][0] <= event.start + 5e-9:
            around.pop()
        stage = _stage(event, copies)
        if stage is None or (around and (around[-1][1] in _CLOSED or stage == Stage.LAUNCH)):
            continue
        around.append((event.end, stage))
        yield stage, event


def _batches(main: list[_Event]) -> Callable[[float], int | None]:
    """A function from a moment to the batch that the main thread was at: they begin with a fetch, or else a step."""
    starts = [event.start for event in main if _stage_by_name(event.name) == Stage.FETCH]
    starts = starts or [event.start for event in main if _STEP.search(event.name)]

    def batch_of(moment: float) -> int | None:
        begun = bisect_right(starts, moment)
        return begun - 1 if begun else None

    return batch_of


def _device_spans(
    device: list[tuple[_Event, Lane]], host: list[_Event], batch_of: Callable[[float], int | None]
) -> Iterator[Span]:
    launched = {event.correlation: event.start for event in host if event.correlation is not None}
    stages = {Lane.DEVICE: Stage.DEVICE, Lane.H2D: Stage.H2D, Lane.D2H: Stage.D2H}
    for event, lane in device:
        batch = batch_of(launched[event.correlation]) if event.correlation in launched else None
        yield Span(stages[lane], lane, event.start, event.end, batch, event.nbytes)


def _measured_on(document: Mapping[str, Any], events: list[_Event], device: list[tuple[_Event, Lane]]) -> str:
    properties = document.get("deviceProperties")
    first = properties[0] if isinstance(properties, list) and properties else None
    if isinstance(first, dict) and (name := _text(first.get("name"))):
        return name
    return "" if device or any(event.category in _ASYNCHRONOUS for event in events) else "cpu"
