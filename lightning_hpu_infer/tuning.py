"""Depths of the pipeline, chosen while it runs: deeper only where waiting says so, and kept only if it was faster."""

import time
from collections.abc import Callable
from operator import ge
from typing import NamedTuple

# From which share of the time waiting is worth a change (TensorFlow's profiler calls an input-bound step from there).
_WORTH = 0.05
# How much faster a change must be to be kept. Several small gains add up.
_GAIN = 0.01
_DEEPEST = 64


class Depths(NamedTuple):
    """How far the pipeline runs ahead and behind."""

    prefetch: int
    in_flight: int


# Factors, in the order in which they are tried. Where input and output both come in bursts, neither depth pays alone.
_MOVES = (Depths(2, 1), Depths(1, 2), Depths(2, 2), Depths(4, 4))


class DepthTuner:
    """Tries greater depths over windows of batches.

    It raises `prefetch` while the main thread waits for input, `in_flight` while it waits for output, and both together
    where one alone did not pay. What does not pay is taken back, and not tried again before something else has paid:
    where the device is the limit, the main thread waits for it at every depth.

    Args:
        depths: Where to start.
        budget: Bytes that the batches ahead and behind may take.
        window: Batches that a measurement takes.
        clock: Seconds, for tests.
    """

    def __init__(
        self, depths: Depths, budget: int, *, window: int = 32, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.depths = depths
        self.log: list[str] = []
        """What was tried, and what came of it."""
        self._budget = budget
        self._window = window
        self._clock = clock
        self._nbytes = 0
        self._untried = set(_MOVES)
        self._before: tuple[Depths, float, tuple[float, float]] | None = None
        """Depths, seconds per batch and shares of the window before a trial."""
        self._start_window(settle=window // 4)

    def launched(self, *, waited: float, blocked: float, nbytes: int) -> Depths | None:
        """Count a batch; returns other depths when it is time for them.

        Args:
            waited: Seconds that the main thread waited for the batch.
            blocked: Seconds that it has waited for output since the batch before.
            nbytes: Size of the batch.
        """
        self._nbytes = max(self._nbytes, nbytes)
        if self._settling:
            self._settling -= 1
            self._began = self._clock()
            return None
        self._batches += 1
        self._waited += waited
        self._blocked += blocked
        if self._batches < self._window:
            return None
        seconds = self._clock() - self._began
        return self._decide(seconds / self._batches, (self._waited / seconds, self._blocked / seconds))

    def summary(self) -> tuple[str, ...]:
        """What was tried and what it ended with, in words."""
        ends = f"prefetch {self.depths.prefetch}, in_flight {self.depths.in_flight}"
        return (*self.log, ends if self.log else f"{ends}: nothing was worth a change")

    def _decide(self, seconds: float, shares: tuple[float, float]) -> Depths | None:
        tried = self.depths
        if self._before is not None:
            depths, before, shares_before = self._before
            took = f"{1e3 * before:.2f} ms per batch before, {1e3 * seconds:.2f} ms after"
            if seconds < (1 - _GAIN) * before:
                self.log.append(f"{_change(depths, tried)}: kept, {took}")
                self._untried = set(_MOVES)
            else:
                self.log.append(f"{_change(depths, tried)}: taken back, {took}")
                self.depths, seconds, shares = depths, before, shares_before
        deeper = self._deeper(shares)
        self._before = None if deeper is None else (self.depths, seconds, shares)
        self.depths = deeper or self.depths
        changed = self.depths != tried
        self._start_window(settle=sum(self.depths) if changed else 0)
        return self.depths if changed else None

    def _deeper(self, shares: tuple[float, float]) -> Depths | None:
        """The next depths to try, if any are worth it."""
        waits = [share >= _WORTH for share in shares]
        for move in _MOVES:
            # What grows has to be waited for; both may grow for the sake of one.
            wanted = any(wait for wait, factor in zip(waits, move, strict=True) if factor > 1)
            if not wanted or move not in self._untried:
                continue
            self._untried.remove(move)
            deeper = Depths(*map(_grown, self.depths, move))
            # Ahead on the host; behind on the device, besides the batch that runs.
            if (sum(deeper) + 1) * self._nbytes > self._budget:
                self._untried -= {other for other in _MOVES if all(map(ge, other, move))}
                line = f"no {_change(self.depths, deeper)}: {self._budget} bytes do not suffice"
                if line not in self.log:
                    self.log.append(line)
            elif deeper != self.depths:
                return deeper
        return None

    def _start_window(self, settle: int) -> None:
        self._settling = settle
        self._batches = 0
        self._waited = self._blocked = 0.0
        self._began = self._clock()


def _grown(depth: int, factor: int) -> int:
    return depth if factor == 1 else min(_DEEPEST, max(1, factor * depth))


def _change(before: Depths, after: Depths) -> str:
    pairs = zip(Depths._fields, before, after, strict=True)
    return ", ".join(f"{name} from {old} to {new}" for name, old, new in pairs if old != new)
