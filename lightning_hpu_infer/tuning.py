"""Depths of the pipeline, chosen while it runs: deeper only where waiting says so, and kept only if it was faster."""

import time
from collections.abc import Callable
from typing import NamedTuple

# From which share of the time waiting is worth a change (TensorFlow's profiler calls an input-bound step from there).
_WORTH = 0.05
# How much faster a change must be to be kept.
_GAIN = 0.03
_DEEPEST = 64


class Depths(NamedTuple):
    """How far the pipeline runs ahead and behind."""

    prefetch: int
    in_flight: int


class DepthTuner:
    """Tries greater depths, one at a time, over windows of batches.

    It raises `prefetch` while the main thread waits for input, and `in_flight` while it waits for output. What does not
    pay is taken back and not tried again: where the device is the limit, the main thread waits for it at every depth.

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
        self._given_up: set[str] = set()
        self._before: tuple[Depths, float, dict[str, float]] | None = None
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
        shares = {"prefetch": self._waited / seconds, "in_flight": self._blocked / seconds}
        return self._decide(seconds / self._batches, shares)

    def summary(self) -> tuple[str, ...]:
        """What was tried and what it ended with, in words."""
        ends = f"prefetch {self.depths.prefetch}, in_flight {self.depths.in_flight}"
        return (*self.log, ends if self.log else f"{ends}: nothing was worth a change")

    def _decide(self, seconds: float, shares: dict[str, float]) -> Depths | None:
        before, depths = self._before, self.depths
        self._before = None
        if before is not None:
            (knob,) = (name for name in Depths._fields if getattr(before[0], name) != getattr(depths, name))
            change = f"{knob} from {getattr(before[0], knob)} to {getattr(depths, knob)}"
            took = f"{1e3 * before[1]:.2f} ms per batch before, {1e3 * seconds:.2f} ms after"
            if seconds < (1 - _GAIN) * before[1]:
                self.log.append(f"{change}: kept, {took}")
            else:
                self.log.append(f"{change}: taken back, {took}")
                self._given_up.add(knob)
                depths, seconds, shares = before
        wanted = next((name for name in Depths._fields if shares[name] >= _WORTH and name not in self._given_up), None)
        deeper = depths if wanted is None else self._deeper(depths, wanted)
        if deeper != depths:
            self._before = (depths, seconds, shares)
        changed = deeper != self.depths
        self.depths = deeper
        self._start_window(settle=deeper.prefetch + deeper.in_flight if changed else 0)
        return deeper if changed else None

    def _deeper(self, depths: Depths, knob: str) -> Depths:
        deeper = depths._replace(**{knob: min(_DEEPEST, max(1, 2 * getattr(depths, knob)))})
        # Ahead on the host; behind on the device, besides the batch that runs.
        if (deeper.prefetch + deeper.in_flight + 1) * self._nbytes > self._budget:
            self._given_up.add(knob)
            self.log.append(f"{knob} stays at {getattr(depths, knob)}: {self._budget} bytes do not suffice for more")
            return depths
        return deeper

    def _start_window(self, settle: int) -> None:
        self._settling = settle
        self._batches = 0
        self._waited = self._blocked = 0.0
        self._began = self._clock()
