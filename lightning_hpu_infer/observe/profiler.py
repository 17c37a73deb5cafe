"""What limited a run that was recorded in a file: by this package, or by PyTorch's profiler on a CPU, CUDA or HPU.

What a Gaudi's events look like was read from its bridge's sources (`backend/profiling/`), not from a trace.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from os import PathLike
from typing import Any, NamedTuple

from lightning_hpu_infer.observe import chrome
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.report import Report
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import Lane, Stage

_DEVICE = {"kernel", "concurrent_kernel", "gpu_memset", "gpu_memcpy"}
_CALLS = {"cuda_runtime", "cuda_driver", "privateuse1_runtime", "hpu_op"}
"""Calls that launch work of a device or wait for it; `hpu_op` is also what other engines than MME and TPC do."""
_HOST = {*_CALLS, "cpu_op", "user_annotation", "python_function"}
_ENGINE = re.compile(r"TPC|MME|DMA|ROTATOR")
"""A Gaudi's engines, each of which is a thread of the trace; those named PDMA copy between host and device."""
_TO_DEVICE = re.compile(r"HtoD|H2D|host_to_", re.IGNORECASE)
_TO_HOST = re.compile(r"DtoH|D2H|_to_host", re.IGNORECASE)
_STAGES: dict[re.Pattern[str], Stage | None] = {
    re.compile(r"ProfilerStep#"): None,
    # Names are those of PyTorch, of Lightning's profiler actions and hooks, of CUDA and of Synapse.
    re.compile(r"enumerate\(DataLoader\)#|predict_next|dataloader\.py\(\d+\): __next__"): Stage.FETCH,
    re.compile(r"on_before_batch_transfer|convert_input"): Stage.PREPARE,
    re.compile(r"aten::_?pin_memory"): Stage.PIN,
    re.compile(r"batch_to_device|on_after_batch_transfer"): Stage.COPY_IN,
    re.compile(r"on_predict_batch_start"): Stage.START_HOOKS,
    re.compile(r"on_predict_batch_end"): Stage.END_HOOKS,
    re.compile(r"synGraphCompile"): Stage.COMPILE,
    re.compile(r"aten::item$|aten::_local_scalar_dense|(Stream|Device|Event)Synchronize"): Stage.WAIT_OUTPUT,
}
_SUPPLY = {Stage.FETCH, Stage.PREPARE, Stage.PIN}
_CLOSED = {*_SUPPLY, Stage.COPY_IN, Stage.COPY_OUT, Stage.WAIT_OUTPUT, Stage.COMPILE}
"""Stages whose inner events are a part of them: the ops of a collate function launch nothing."""


class _Event(NamedTuple):
    """`correlation` is shared by a call and the device's work that it launched; `lane` is for events of the device."""

    name: str
    category: str
    process: Any
    thread: Any
    start: float
    end: float
    correlation: Any
    nbytes: int
    lane: Lane | None


def diagnose(path: str | PathLike[str]) -> tuple[list[Span], Report]:
    """The spans of a file, and what limited the run.

    Args:
        path: A trace of this package, or a Chrome trace of PyTorch's profiler from a CPU, CUDA or HPU run; gzipped or
            not. It is read once, so it may be a pipe.

    Raises:
        OSError: If the file cannot be read.
        TraceFileError: If it is not such a trace, or a damaged or empty one.
    """
    document, measured_on = chrome.load(path), ""
    if chrome.is_ours(document):
        spans, about = chrome.from_chrome(document, path)
        try:
            # It was made with the run's flags and counters, which spans do not tell.
            return spans, Report.from_dict(about["report"])
        except (KeyError, TypeError, ValueError):
            pass  # another version wrote it, or there is none
    else:
        try:
            spans, measured_on = from_profiler(document)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise chrome.TraceFileError(f"{path} is damaged ({type(error).__name__}: {error}).") from error
    if not spans:
        raise chrome.TraceFileError(f"{path} has no event of a host thread or a device: record at least one batch.")
    return spans, analyse(spans, measured_on=measured_on)


def from_profiler(document: Mapping[str, Any]) -> tuple[list[Span], str]:
    """The spans of a Chrome trace of PyTorch's profiler, and the device's name, empty if unknown."""
    found = document["traceEvents"]
    names = {(each["pid"], each["tid"]): each["args"]["name"] for each in found if each.get("name") == "thread_name"}
    events = [_event(each, names) for each in found if each.get("ph") == "X"]
    events.sort(key=lambda event: (event.start, -event.end))  # outer ones before those inside of them
    device = [event for event in events if event.lane is not None]
    host = [event for event in events if event.lane is None and event.category in _HOST]
    threads = Counter((event.process, event.thread) for event in host)
    # A process's first thread has its number. The bridge writes its calls into another process, under the same thread.
    first = [thread for process, thread in threads if process == thread]
    main = next(iter([*first, *(thread for (_, thread), _ in threads.most_common(1))]), None)
    batch_of = _batches([event for event in host if event.thread == main])
    copies = {event.correlation: event.lane for event in device if event.correlation is not None}
    spans = list(_host_spans(host, main, copies, batch_of))
    launched = {event.correlation: event.start for event in host if event.correlation is not None}
    for event in device:
        assert event.lane is not None
        batch = batch_of(launched[event.correlation]) if event.correlation in launched else None
        stage = {Lane.H2D: Stage.H2D, Lane.D2H: Stage.D2H}.get(event.lane, Stage.DEVICE)
        spans.append(Span(stage, event.lane, event.start, event.end, batch, event.nbytes))
    categories = {event.category for event in events}
    name = next((each.get("name", "") for each in document.get("deviceProperties", [])), "")
    if "hpu_op" in categories:
        name = f"HPU {name}".strip()
    return spans, name or ("" if categories & {*_CALLS, *_DEVICE} else "cpu")


def _event(event: Mapping[str, Any], names: Mapping[tuple[Any, Any], str]) -> _Event:
    process, thread, category, args = event.get("pid"), event.get("tid"), event.get("cat", ""), event.get("args", {})
    engine, lane = names.get((process, thread), ""), None
    if category in _DEVICE or (category == "hpu_op" and _ENGINE.search(engine)):
        host_engine = "PDMA" in engine
        lane = None if host_engine else Lane.DEVICE
        if host_engine or category == "gpu_memcpy":
            words = f"{event['name']} {args}"
            lane = Lane.H2D if _TO_DEVICE.search(words) else Lane.D2H if _TO_HOST.search(words) else lane
    start, nbytes = event["ts"] / 1e6, int(args.get("bytes", 0))
    end = start + max(event["dur"], 0) / 1e6
    return _Event(event["name"], category, process, thread, start, end, args.get("correlation"), nbytes, lane)


def _host_spans(
    host: list[_Event], main: Any, copies: Mapping[Any, Lane | None], batch_of: Callable[[float], int | None]
) -> Iterator[Span]:
    """Spans of the events that say something that those around them do not."""
    running: dict[Any, list[tuple[float, Stage]]] = defaultdict(list)
    for event in host:
        stage, around = _stage_of(event.name), running[event.thread]
        # Sums of microseconds are inexact.
        while around and around[-1][0] <= event.start + 5e-9:
            around.pop()
        if stage is None or (event.thread != main and stage not in _SUPPLY):
            continue
        if stage == Stage.LAUNCH and event.category in _CALLS:
            copied = copies.get(event.correlation)
            stage = Stage.COPY_IN if copied == Lane.H2D else Stage.COPY_OUT if copied == Lane.D2H else stage
        if around and (around[-1][1] in _CLOSED or stage == Stage.LAUNCH):
            continue
        around.append((event.end, stage))
        lane, batch = (Lane.MAIN, batch_of(event.start)) if event.thread == main else (Lane.PREFETCH, None)
        yield Span(stage, lane, event.start, event.end, batch)


@lru_cache(maxsize=4096)  # a trace has millions of events and few names
def _stage_of(name: str) -> Stage | None:
    """What a host event was for; None says nothing."""
    return next((stage for pattern, stage in _STAGES.items() if pattern.search(name)), Stage.LAUNCH)


def _batches(main: list[_Event]) -> Callable[[float], int | None]:
    """A function from a moment to the main thread's batch: a batch begins with a fetch, or else with a step."""
    starts = [event.start for event in main if _stage_of(event.name) == Stage.FETCH]
    starts = starts or [event.start for event in main if event.name.startswith("ProfilerStep#")]
    return lambda moment: bisect_right(starts, moment) - 1 if starts and moment >= starts[0] else None
