"""Metrics: counters that listen to the device's events."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from habana_frameworks.torch import _hpu_C

__all__ = ["MetricNotFound", "metric_global", "metric_localcontext", "metrics_dump"]


class MetricNotFound(Exception):
    """Raised when there is no metric of that name."""


class Metric:
    """One named group of counters; `stats` is a list of pairs as on the real bridge."""

    def __init__(self, name: str, listen: Callable[[dict[str, Any], str, float], None], zero: dict[str, Any]) -> None:
        self.name = name
        self._listen, self._zero = listen, zero
        self.reset()

    def reset(self) -> None:
        """Start again."""
        self._values = {key: type(value)(value) for key, value in self._zero.items()}

    def stats(self) -> list[tuple[str, Any]]:
        """Return the counters."""
        return list(self._values.items())

    def __call__(self, event: str, amount: float) -> None:
        self._listen(self._values, event, amount)


def _graph_compilation(values: dict[str, Any], event: str, amount: float) -> None:
    if event == "graph_compilation":
        values["TotalNumber"] += 1
        values["TotalTime"] += int(amount * 1e6)
        values["AvgTime"] = values["TotalTime"] / values["TotalNumber"]


def _cpu_fallback(values: dict[str, Any], event: str, amount: float) -> None:
    kind, _, name = event.partition(":")
    if kind == "cpu_fallback":
        values["TotalNumber"] += 1
        values["FallbackOps"] = {**values["FallbackOps"], name: values["FallbackOps"].get(name, 0) + 1}


def _recipe_cache(values: dict[str, Any], event: str, amount: float) -> None:
    if event in ("recipe_hit", "recipe_miss"):
        values["TotalHit" if event == "recipe_hit" else "TotalMiss"] += 1


_KINDS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "graph_compilation": (_graph_compilation, {"TotalNumber": 0, "TotalTime": 0, "AvgTime": 0}),
    "cpu_fallback": (_cpu_fallback, {"TotalNumber": 0, "FallbackOps": {}}),
    "memory_defragmentation": (
        lambda values, event, amount: None,
        {"TotalNumber": 0, "TotalSuccessful": 0, "AvgTime": 0, "MaxTime": 0},
    ),
}
if os.getenv("PT_HPU_ENABLE_CACHE_METRICS"):  # read at import (bridge: metrics.py:393-400)
    _KINDS["recipe_cache"] = (_recipe_cache, {"TotalHit": 0, "RecipeHit": [], "TotalMiss": 0, "RecipeMiss": []})

_global = {name: Metric(name, *kind) for name, kind in _KINDS.items()}
_local: list[Metric] = []


def _dispatch(event: str, amount: float) -> None:
    for metric in (*_global.values(), *_local):
        metric(event, amount)


_hpu_C.add_listener(_dispatch)


def metric_global(name: str) -> Metric | None:
    """Return the metric since the start of the process; None if there is none of that name."""
    return _global.get(name)


@contextlib.contextmanager
def metric_localcontext(name: str) -> Iterator[Metric]:
    """Count inside the context only."""
    if name not in _KINDS:
        raise MetricNotFound(f"no metric {name!r}; there are {sorted(_KINDS)}")
    metric = Metric(name, *_KINDS[name])
    _local.append(metric)
    try:
        yield metric
    finally:
        _local.remove(metric)


def metrics_dump(file: Any = None, file_format: str = "json") -> None:
    """Write all metrics to `file` as JSON."""
    if file_format != "json":
        raise ValueError(f"the emulator writes metrics as 'json' only, not as {file_format!r}")
    if file is not None:
        with open(file, "w", encoding="utf-8") as stream:
            json.dump({name: dict(metric.stats()) for name, metric in _global.items()}, stream)
