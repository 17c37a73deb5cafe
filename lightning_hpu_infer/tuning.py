"""Depths of the pipeline, chosen while it runs: greater only where it waits, and kept only if that was faster."""

import time
from collections.abc import Callable
from operator import attrgetter, ge
from statistics import mean
from typing import Any, NamedTuple, TypeVar

from lightning_hpu_infer.nested import size_of
from lightning_hpu_infer.observer import Lane, Observer, Stage

T = TypeVar("T")

# From which share of the time waiting is worth a change (TensorFlow's profiler calls an input-bound step from there).
_WORTH = 0.05
# How much faster a change must be to be kept, in each of its windows than in each of those around them.
_GAIN = 0.02
# Windows of a trial: before, deeper, before, deeper, before.
_WINDOWS = 5
_DEEPEST = 64


class Depths(NamedTuple):
    """How far the pipeline runs ahead and behind."""

    prefetch: int
    in_flight: int


# What is tried at first, the deepest that the budget allows, and the windows of that trial as parts of a usual one.
_LEAPS = (Depths(8, 8), Depths(4, 4), Depths(2, 2))
_LEAP_WINDOWS = (0.25, 0.5, 0.5, 0.5)
_PLAIN_GAIN = 0.05
# So much faster in the first window of that trial that it is kept without another look at the depths before.
_LARGE_GAIN = 0.08
# Factors, in the order in which they are tried. Where input and output both come in bursts, neither depth pays alone.
_MOVES = (Depths(2, 1), Depths(1, 2), Depths(2, 2), Depths(4, 4))


class DepthTuner(Observer):
    """Tries greater depths over windows of batches.

    It raises `prefetch` while the main thread waits for input, `in_flight` while it waits for output, and both together
    where one alone did not pay. What does not pay is taken back, and not tried again before something else has paid:
    where the device is the limit, the main thread waits for it at every depth.

    The first trial comes after a few batches and leaps, so that a short run profits too. A later one is a window of
    greater depths between two windows of those before, so that batches that become smaller from window to window, as
    they do in order of length, are no gain.

    Args:
        depths: Where to start, and the least that is used. Where no thread prefetches (`prefetch` is 0), none will.
        budget: Bytes that the batches ahead, and the batches and outputs behind, may take at greater depths.
        apply: Called with the depths to run with, whenever they change.
        content: What of a prepared batch takes memory.
        window: Batches that a measurement takes.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        depths: Depths,
        budget: int,
        *,
        apply: Callable[[Depths], object] | None = None,
        content: Callable[[Any], Any] = attrgetter("data"),
        window: int = 32,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.depths = depths
        """Those to run with now."""
        self.log: list[str] = []
        """What was tried, and what came of it."""
        self._first = depths
        self._budget = budget
        self._apply = apply
        self._content = content
        self._window = window
        self._clock = clock
        self._fetching = 0.0
        """Seconds that the main thread has waited for, and copied, the output of the oldest batch."""
        self._batch = self._output = 0
        """Bytes of the largest ones."""
        self._windows = 0
        self._untried = set(_MOVES)
        self._trial: tuple[Depths, Depths] | None = None
        """Depths before, and those that are tried."""
        self._measured: list[float] = []
        """Seconds per batch in the windows of a trial so far."""
        self._leaps = True
        self._start_window(settle=window // 8)

    def wrap(self, stage: Stage, function: Callable[..., T], lane: Lane = Lane.MAIN) -> Callable[..., T]:
        """Measure how long the main thread waits for each prepared batch."""
        if stage != Stage.WAIT_INPUT:
            return function

        def take(*args: Any) -> T:
            began = self._clock()
            batch = function(*args)
            if batch is not None:
                self.launched(waited=self._clock() - began, nbytes=size_of(self._content(batch)))
            return batch

        return take

    def timed(self, stage: Stage, function: Callable[..., T], *args: Any) -> T:
        """Measure how long the main thread is busy with fetching an output."""
        if stage not in (Stage.WAIT_OUTPUT, Stage.COPY_OUT):
            return function(*args)
        began = self._clock()
        try:
            return function(*args)
        finally:
            self._fetching += self._clock() - began

    def completed(self, output: Any) -> None:
        """Count a batch whose output is there, and change the depths when it is time to."""
        before = self.depths
        self.retired(blocked=self._fetching, nbytes=size_of(output))
        self._fetching = 0.0
        if self.depths != before and self._apply is not None:
            self._apply(self.depths)

    def launched(self, *, waited: float, nbytes: int) -> None:
        """Note a batch on its way to the device.

        Args:
            waited: Seconds that the main thread waited for it.
            nbytes: Its size.
        """
        self._waited += waited
        self._batch = max(self._batch, nbytes)

    def retired(self, *, blocked: float, nbytes: int) -> None:
        """Count a finished batch, and change `depths` when it is time to.

        Args:
            blocked: Seconds that the main thread waited for its output.
            nbytes: Size of the output.
        """
        self._output = max(self._output, nbytes)
        if self.depths != self._first and self._bytes(self.depths) > self._budget:
            self._retreat()
        if self._settling:
            self._settling -= 1
            self._waited = self._blocked = 0.0
            self._began = self._clock()
            return
        self._batches += 1
        self._blocked += blocked
        if self._batches < self._window * (_LEAP_WINDOWS[len(self._measured)] if self._leaps else 1):
            return
        seconds = self._clock() - self._began
        self._change(self._decide(seconds / self._batches, (self._waited / seconds, self._blocked / seconds)))

    def summary(self) -> tuple[str, ...]:
        """What was tried and what it ended with, in words."""
        ends = f"prefetch {self.depths.prefetch}, in_flight {self.depths.in_flight}"
        if not self._first.prefetch:
            ends += ", no thread prefetches"
        if self.log:
            return (*self.log, ends)
        return (f"{ends}: {'nothing was worth a change' if self._windows else 'too short a run to try others'}",)

    def _decide(self, seconds: float, shares: tuple[float, float]) -> Depths:
        """The depths of the next window."""
        self._measured.append(seconds)
        self._windows += 1
        if self._leaps:
            return self._leap(shares)
        if self._trial is not None:
            before, deeper = self._trial
            usual, tried = self._measured[::2], self._measured[1::2]
            pays = max(tried) < (1 - _GAIN) * min(usual)
            if pays and len(self._measured) < _WINDOWS:
                return before if self.depths == deeper else deeper
            self._log_trial(pays, mean(tried), mean(usual))
            self._trial, self._measured = None, []
            if pays:
                self._untried = set(_MOVES)
                return deeper
            if self.depths == deeper:
                return before
            self._measured = [seconds]
        deeper = self._deeper(shares)
        if deeper == self.depths:
            self._measured = []
        else:
            self._trial = self.depths, deeper
        return deeper

    def _leap(self, shares: tuple[float, float]) -> Depths:
        """The depths of the next window of the first trial."""
        if self._trial is None:
            deeper = next((depths for depths in map(self._leapt, _LEAPS) if self._bytes(depths) <= self._budget), None)
            if max(shares) < _WORTH or deeper is None or deeper == self.depths:
                self._leaps, self._measured = False, []
                return self.depths
            self._trial = self.depths, deeper
            return deeper
        before, deeper = self._trial
        usual, tried = self._measured[::2][-1], self._measured[1::2]
        first = len(self._measured) == 2
        pays = max(tried) < (1 - (_LARGE_GAIN if first else _PLAIN_GAIN)) * usual
        if len(self._measured) < len(_LEAP_WINDOWS) and not (first and pays):
            return before if self.depths == deeper else deeper
        self._log_trial(pays, mean(tried), usual)
        self._trial, self._measured, self._leaps = None, [], False
        return deeper if pays else before

    def _leapt(self, depths: Depths) -> Depths:
        """Those depths, as far as they are deeper than now and a thread prefetches."""
        prefetch = max(self.depths.prefetch, depths.prefetch) if self.depths.prefetch else 0
        return Depths(prefetch, max(self.depths.in_flight, depths.in_flight))

    def _log_trial(self, pays: bool, tried: float, usual: float) -> None:
        assert self._trial is not None
        self.log.append(
            f"{_difference(*self._trial)}: {'kept' if pays else 'taken back'},"
            f" {1e3 * tried:.2f} ms per batch instead of {1e3 * usual:.2f} ms"
        )

    def _deeper(self, shares: tuple[float, float]) -> Depths:
        """The next depths to try, the same if none are worth it."""
        waits = [share >= _WORTH for share in shares]
        for move in _MOVES:
            # What grows has to be waited for; both may grow for the sake of one.
            wanted = any(wait for wait, factor in zip(waits, move, strict=True) if factor > 1)
            if not wanted or move not in self._untried:
                continue
            self._untried.remove(move)
            prefetch, in_flight = self.depths
            if move.in_flight > 1:
                in_flight = max(in_flight, min(_DEEPEST, move.in_flight * max(1, in_flight)))
            deeper = Depths(max(prefetch, min(_DEEPEST, move.prefetch * prefetch)), in_flight)
            if self._bytes(deeper) > self._budget:
                self._untried -= {other for other in _MOVES if all(map(ge, other, move))}
                line = f"no {_difference(self.depths, deeper)}: {self._budget} bytes do not suffice"
                if line not in self.log:
                    self.log.append(line)
            elif deeper != self.depths:
                return deeper
        return self.depths

    def _bytes(self, depths: Depths) -> int:
        # Ahead on the host; behind on the device, besides the batch that runs.
        return depths.prefetch * self._batch + (depths.in_flight + 1) * (self._batch + self._output)

    def _retreat(self) -> None:
        """Batches have become too large for what they were measured with."""
        self.log.append(f"{_difference(self.depths, self._first)}: {self._budget} bytes no longer suffice")
        self._trial, self._measured, self._untried, self._leaps = None, [], set(_MOVES), False
        self._change(self._first)

    def _change(self, depths: Depths) -> None:
        # Finished batches are counted, not launched ones, of which there may be more while a greater depth is filled.
        self._start_window(settle=max(sum(self.depths), sum(depths)) if depths != self.depths else 0)
        self.depths = depths

    def _start_window(self, settle: int) -> None:
        self._settling = settle
        self._batches = 0
        self._waited = self._blocked = 0.0
        self._began = self._clock()


class WhilePredicting(Observer):
    """Passes on to the tuner of a run of `predict`, while there is one."""

    def __init__(self) -> None:
        self.tuner: DepthTuner | None = None
        self.last: DepthTuner | None = None
        """That of the newest run, which may be over."""

    def wrap(self, stage: Stage, function: Callable[..., T], lane: Lane = Lane.MAIN) -> Callable[..., T]:
        """The function, which looks at each call whether there is a tuner."""
        if stage != Stage.WAIT_INPUT:
            return function

        def call(*args: Any) -> T:
            tuner = self.tuner
            return (function if tuner is None else tuner.wrap(stage, function))(*args)

        return call

    def timed(self, stage: Stage, function: Callable[..., T], *args: Any) -> T:
        """Call the function, timed by the tuner."""
        tuner = self.tuner
        return function(*args) if tuner is None else tuner.timed(stage, function, *args)

    def completed(self, output: Any) -> None:
        """Tell the tuner."""
        if (tuner := self.tuner) is not None:
            tuner.completed(output)


def _difference(before: Depths, after: Depths) -> str:
    pairs = zip(Depths._fields, before, after, strict=True)
    return ", ".join(f"{name} from {old} to {new}" for name, old, new in pairs if old != new)
