"""How long runs take with techniques off and on, after their predictions were found equal."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_hpu_infer.verify.ask import host
from lightning_hpu_infer.verify.check import Check, Kind, Seen
from lightning_hpu_infer.verify.compare import DEVICE_TOLERANCES, distance
from lightning_hpu_infer.verify.predict import ALL_OFF, insisting, predict, trainer

_WIDTH = 256


class _Net(LightningModule):
    """Takes the time of its own run, without the Trainer's set-up."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.marks: list[float] = []

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch)

    def on_predict_epoch_start(self) -> None:
        self.marks = [time.perf_counter()]

    def on_predict_epoch_end(self) -> None:
        self.marks.append(time.perf_counter())


def _deep() -> nn.Module:
    """Many small ops: what its launches cost counts."""
    layers = [part for _ in range(12) for part in (nn.Linear(_WIDTH, _WIDTH), nn.LayerNorm(_WIDTH), nn.GELU())]
    return nn.Sequential(*layers)


def _wide() -> nn.Module:
    """Few ops on much data: what its copies cost counts."""
    return nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU())


NETWORKS = {"many small ops": (_deep, 32), "few ops, large batches": (_wide, 2048)}
"""Networks, and rows of a batch."""
_BASE = "all off"
ARMS: dict[str, Callable[[], dict[str, Any]]] = {
    _BASE: dict,
    "hpu_graphs": lambda: {"hpu_graphs": insisting()},
    "async_copy": lambda: {"async_copy": True},
    "pipelining": lambda: {"pipelining": True},
    "defaults": lambda: {"hpu_graphs": insisting(), "async_copy": True, "pipelining": True},
}
"""Flags, beside which all others are off. "defaults" insists on graphs, which a run as short as these would not get."""


def checks(*, quick: bool) -> Iterator[Check]:
    """A check per network.

    Args:
        quick: Only one of them, in fewer rounds and batches.
    """
    rounds, batches = (3, 10) if quick else (7, 40)
    for name in list(NETWORKS)[: 1 if quick else None]:
        run = partial(_timed, name, rounds, batches)
        yield Check(kind=Kind.TIMING, name=name, run=run, turns_off="Set `hpu_graphs=False, async_copy=False`.")


def _timed(name: str, rounds: int, number: int) -> Seen:
    """The arms in turn, each round in another order; each ratio is of times of one round."""
    make, rows = NETWORKS[name]
    batches = [host(rows, _WIDTH, seed=seed) for seed in range(number)]
    arms = {arm: _Arm(make, ALL_OFF | flags()) for arm, flags in ARMS.items()}
    expected = arms[_BASE].run(batches)[0]
    for arm, each in arms.items():  # also traces and captures, which is not timed
        distance(each.run(batches)[0], expected, DEVICE_TOLERANCES, f"those without {arm},")
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        first = turn % len(arms)
        for arm in [*list(arms)[first:], *list(arms)[:first]]:
            seconds[arm].append(arms[arm].run(batches)[1])
    milliseconds = {arm: statistics.median(times) / number * 1e3 for arm, times in seconds.items()}
    speedups = {arm: _speedup(seconds[_BASE], times) for arm, times in seconds.items() if arm != _BASE}
    words = (f"{arm} {each['median']:.2f} ({each['least']:.2f}-{each['most']:.2f})" for arm, each in speedups.items())
    return Seen(
        f"times as fast as {_BASE} ({milliseconds[_BASE]:.2f} ms a batch): {', '.join(words)}",
        {"speedup": speedups, "milliseconds_per_batch": milliseconds, "rounds": rounds, "batches": number},
    )


def _speedup(base: list[float], times: list[float]) -> dict[str, float]:
    ratios = sorted(one / other for one, other in zip(base, times, strict=True))
    return {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}


class _Arm:
    """One way to predict: a Trainer with its model, which keep their graphs from run to run."""

    def __init__(self, make: Callable[[], nn.Module], flags: dict[str, Any]) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._module = _Net(make()).eval()
        self._trainer = trainer(flags)

    def run(self, batches: list[Tensor]) -> tuple[Any, float]:
        """Predictions, and the seconds that they took."""
        predictions = predict(self._trainer, self._module, batches).predictions
        start, end = self._module.marks
        return predictions, end - start
