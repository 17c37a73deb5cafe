"""Metrics: counters that listen to the device's events."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator
from typing import Any, ClassVar

from habana_frameworks.torch.utils.event_dispatcher import EventDispatcher, EventId

__all__ = ["MetricNotFound", "metric_global", "metric_localcontext", "metrics_dump"]


class MetricNotFound(Exception):
    """Raised when there is no metric of that name."""


class Metric:
    """One named group of counters, which counts from its creation to `stop`."""

    NAME: ClassVar[str]
    ZERO: ClassVar[dict[str, Any]]
    TOPICS: ClassVar[tuple[EventId, ...]]

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self.reset()
        self.start()

    def name(self) -> str:
        """Return the name."""
        return self.NAME

    def stats(self) -> list[tuple[str, Any]]:
        """Return the counters."""
        return list(self._values.items())

    def reset(self) -> None:
        """Start again at zero."""
        self._values = {key: type(value)(value) for key, value in self.ZERO.items()}

    def start(self) -> None:
        """Count again after `stop`."""
        if not self._handles:
            dispatcher = EventDispatcher.instance()
            self._handles = [dispatcher.subscribe(topic, self._listener(topic)) for topic in self.TOPICS]

    def stop(self) -> None:
        """Count no more."""
        while self._handles:
            EventDispatcher.instance().unsubscribe(self._handles.pop())

    def _listener(self, topic: EventId) -> Any:
        return lambda timestamp, params: self._count(self._values, topic, dict(params))

    def _count(self, values: dict[str, Any], topic: EventId, params: dict[str, str]) -> None:
        raise NotImplementedError


class _GraphCompilation(Metric):
    NAME, TOPICS = "graph_compilation", (EventId.GRAPH_COMPILATION,)
    ZERO: ClassVar[dict[str, Any]] = {"TotalNumber": 0, "TotalTime": 0, "AvgTime": 0}

    def _count(self, values: dict[str, Any], topic: EventId, params: dict[str, str]) -> None:
        values["TotalNumber"] += 1
        values["TotalTime"] += int(params["duration"])
        values["AvgTime"] = values["TotalTime"] / values["TotalNumber"]


class _CpuFallback(Metric):
    NAME, TOPICS = "cpu_fallback", (EventId.CPU_FALLBACK,)
    ZERO: ClassVar[dict[str, Any]] = {"TotalNumber": 0, "FallbackOps": {}}

    def _count(self, values: dict[str, Any], topic: EventId, params: dict[str, str]) -> None:
        ops, name = values["FallbackOps"], params["op_name"]
        values["TotalNumber"] += 1
        ops[name] = ops.get(name, 0) + 1


class _MemoryDefragmentation(Metric):
    NAME, TOPICS = "memory_defragmentation", ()  # the emulated memory has no fragments
    ZERO: ClassVar[dict[str, Any]] = {"TotalNumber": 0, "TotalSuccessful": 0, "AvgTime": 0, "MaxTime": 0}


class _RecipeCache(Metric):
    NAME, TOPICS = "recipe_cache", (EventId.CACHE_HIT, EventId.CACHE_MISS)
    ZERO: ClassVar[dict[str, Any]] = {"TotalHit": 0, "RecipeHit": {}, "TotalMiss": 0, "RecipeMiss": {}}

    def _count(self, values: dict[str, Any], topic: EventId, params: dict[str, str]) -> None:
        kind, recipe = "Hit" if topic is EventId.CACHE_HIT else "Miss", params["recipe_id"]
        values[f"Total{kind}"] += 1
        values[f"Recipe{kind}"][recipe] = values[f"Recipe{kind}"].get(recipe, 0) + 1


_KINDS = {kind.NAME: kind for kind in (_GraphCompilation, _CpuFallback, _MemoryDefragmentation)}
if os.getenv("PT_HPU_ENABLE_CACHE_METRICS", "").lower() in ("y", "yes", "t", "true", "on", "1"):  # read at import
    _KINDS[_RecipeCache.NAME] = _RecipeCache
_global = {name: kind() for name, kind in _KINDS.items()}


def metric_global(name: str) -> Metric | None:
    """Return the metric since the start of the process; None if there is none of that name."""
    return _global.get(name)


@contextlib.contextmanager
def metric_localcontext(name: str) -> Iterator[Metric]:
    """Count inside the context only."""
    if name not in _KINDS:
        raise MetricNotFound(f"no metric {name!r}; there are {sorted(_KINDS)}")
    metric = _KINDS[name]()
    try:
        yield metric
    finally:
        metric.stop()


def metrics_dump(file_name: str, format: str = "json") -> None:
    """Write all metrics to a file as JSON."""
    if format != "json":
        raise ValueError(f"the emulator writes metrics as 'json' only, not as {format!r}")
    now = datetime.datetime.now().isoformat()
    dump = [
        {"metric_name": name, "triggered_by": "user", "generated_on": now, "statistics": dict(metric.stats())}
        for name, metric in _global.items()
    ]
    with open(file_name, "w", encoding="utf-8") as file:
        json.dump(dump, file)
