"""Depths that are chosen while the pipeline runs."""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, emulator
from lightning_hpu_infer.prefetch import Prefetcher
from lightning_hpu_infer.tuning import Depths, DepthTuner
from tests.helpers import HookLog, Net, assert_like_stock, predict, rows, trainer

FIRST = Depths(2, 1)
Durations = Callable[[int], tuple[float, float, float]]


class Simulated:
    """A pipeline in virtual time: a preparing thread, a device, and a main thread that launches and finishes."""

    def __init__(self, durations: Durations, tuner: DepthTuner | None = None, depths: Depths = FIRST) -> None:
        self.now = 0.0
        self.durations = durations
        self.depths = depths
        self.tuner = tuner

    def clock(self) -> float:
        return self.now

    def run(self, batches: int, size: Callable[[int], int] = lambda i: 1, output: int = 0) -> float:
        """Seconds for that many batches. `size` and `output` are bytes."""
        taken: list[float] = []  # when the main thread took each prepared batch
        prepared: list[float] = []
        done: list[float] = []  # when the device had computed each batch
        retired = 0
        for i in range(batches):
            prepare, compute, _ = self.durations(i)
            # A place is free once batch i - prefetch was taken.
            free = taken[i - self.depths.prefetch] if i >= self.depths.prefetch else 0.0
            prepared.append(max(prepared[-1] if prepared else 0.0, free) + prepare)
            waited = max(0.0, prepared[i] - self.now)
            self.now += waited
            taken.append(self.now)
            done.append(max(self.now, done[-1] if done else 0.0) + compute)
            if self.tuner is not None:
                self.tuner.launched(waited=waited, nbytes=size(i))
            while i - retired >= self.depths.in_flight:
                blocked = max(0.0, done[retired] - self.now)
                self._retire(done, retired)
                retired += 1
                if self.tuner is not None:
                    self.tuner.retired(blocked=blocked, nbytes=output)
                    self.depths = self.tuner.depths
        for i in range(retired, batches):
            self._retire(done, i)
        return self.now

    def _retire(self, done: list[float], i: int) -> None:
        self.now = max(self.now, done[i]) + self.durations(i)[2]


def tuned(durations: Durations, budget: int = 10**9, batches: int = 2000) -> tuple[Simulated, DepthTuner]:
    pipeline = Simulated(durations)
    tuner = DepthTuner(FIRST, budget, clock=pipeline.clock)
    pipeline.tuner = tuner
    pipeline.run(batches)
    return pipeline, tuner


def bursts(every: int, long: float, short: float) -> Callable[[int], float]:
    return lambda i: long if i % every == 0 else short


STEADY: dict[str, Durations] = {
    "input-bound": lambda i: (0.030, 0.020, 0.005),
    "device-bound": lambda i: (0.010, 0.030, 0.005),
    "output-bound": lambda i: (0.010, 0.020, 0.030),
    "balanced": lambda i: (0.020, 0.020, 0.020),
}
# Stages that take long now and then: depth lets the others go on meanwhile.
BURSTS: dict[str, Durations] = {
    "bursts of input": lambda i: (bursts(16, 0.160, 0.010)(i), 0.020, 0.001),
    "bursts of output": lambda i: (0.001, 0.020, bursts(16, 0.160, 0.005)(i)),
}


def uneven(seed: int) -> Durations:
    """Stages that are as long on the average, and very different from batch to batch."""
    generator = random.Random(seed)
    seconds = [[generator.expovariate(1 / 0.020) for _ in range(16)] for _ in range(3)]
    return lambda i: (seconds[0][i % 16], seconds[1][i % 16], seconds[2][i % 16])


# Among them those where one depth alone does not pay, or only in several small steps.
UNEVEN: dict[str, Durations] = {f"uneven {seed}": uneven(seed) for seed in range(20)}


@pytest.mark.parametrize("mix", STEADY)
def test_steady_stages_keep_the_first_depths(mix: str) -> None:
    """Whatever is the bottleneck, more of the same batches ahead do not help, so what is tried is taken back."""
    pipeline, tuner = tuned(STEADY[mix])
    assert pipeline.depths == FIRST, tuner.log


@pytest.mark.parametrize("mix", STEADY | BURSTS | UNEVEN)
def test_it_ends_within_three_percent_of_the_best_fixed_depths(mix: str) -> None:
    durations = (STEADY | BURSTS | UNEVEN)[mix]
    pipeline, tuner = tuned(durations)
    fixed = [Depths(p, f) for p in (1, 2, 4, 8, 16, 32, 64) for f in (1, 2, 4, 8, 16, 32, 64)]
    best = min(Simulated(durations, depths=depths).run(1600) for depths in fixed)
    assert Simulated(durations, depths=pipeline.depths).run(1600) <= 1.03 * best, (pipeline.depths, tuner.log)


@pytest.mark.parametrize("mix", [*BURSTS, *(name for name in UNEVEN if name not in ("uneven 11", "uneven 15"))])
def test_a_short_run_profits_too(mix: str) -> None:
    """Of the time that depth can save, a run of 60 batches saves at least half."""
    durations = (BURSTS | UNEVEN)[mix]
    pipeline = Simulated(durations)
    pipeline.tuner = DepthTuner(FIRST, 10**9, clock=pipeline.clock)
    found = pipeline.run(60)
    usual = Simulated(durations).run(60)
    best = min(Simulated(durations, depths=Depths(p, f)).run(60) for p in (2, 4, 8, 16) for f in (1, 2, 4, 8, 16))
    assert usual - found >= 0.5 * (usual - best), (pipeline.depths, pipeline.tuner.log)


def test_a_large_gain_is_kept_within_tens_of_batches() -> None:
    pipeline, tuner = tuned(lambda i: (0.001, 0.020, (0.040, 0.001)[i % 2]), batches=52)
    assert pipeline.depths == (8, 8)
    assert [": kept" in line for line in tuner.log] == [True]


@pytest.mark.parametrize(("mix", "knob"), [("bursts of input", "prefetch"), ("bursts of output", "in_flight")])
def test_it_deepens_where_the_waiting_is_and_says_so(mix: str, knob: str) -> None:
    pipeline, tuner = tuned(BURSTS[mix])
    assert getattr(pipeline.depths, knob) > getattr(FIRST, knob)
    assert any(f"{knob} from " in line and "kept" in line for line in tuner.log)


def test_rule_10_the_budget_bounds_the_depths() -> None:
    pipeline, tuner = tuned(BURSTS["bursts of input"], budget=4)
    # Two ahead, one behind and the one that runs are four bytes.
    assert pipeline.depths == FIRST
    assert tuner.log == [
        "no prefetch from 2 to 4: 4 bytes do not suffice",
        "no in_flight from 1 to 2: 4 bytes do not suffice",
    ]


def test_rule_10_outputs_count() -> None:
    pipeline = Simulated(BURSTS["bursts of output"])
    pipeline.tuner = DepthTuner(FIRST, 1000, clock=pipeline.clock)
    pipeline.run(1000, output=300)
    assert pipeline.depths.in_flight <= 2, pipeline.tuner.log


def test_rule_10_larger_batches_make_the_pipeline_shallower() -> None:
    pipeline = Simulated(BURSTS["bursts of input"])
    pipeline.tuner = DepthTuner(FIRST, 100, clock=pipeline.clock)
    pipeline.run(1500, size=lambda i: 1)
    deep = pipeline.tuner.depths
    assert deep.prefetch > FIRST.prefetch
    pipeline.tuner.launched(waited=0, nbytes=50)
    pipeline.tuner.retired(blocked=0, nbytes=0)
    assert pipeline.tuner.depths == FIRST
    assert pipeline.tuner.log[-1].startswith(f"prefetch from {deep.prefetch} to 2")
    assert pipeline.tuner.log[-1].endswith(": 100 bytes no longer suffice")


@pytest.mark.parametrize("last", [0.3, 3.0])
def test_batches_that_become_cheaper_or_dearer_are_no_gain(last: float) -> None:
    """In order of length each window is a bit faster than the one before it, whatever the depths."""
    batches = 6000
    factor = [last ** (i / batches) for i in range(batches)]
    pipeline, tuner = tuned(lambda i: (0.030 * factor[i], 0.010 * factor[i], 0.005), batches=batches)
    assert pipeline.depths == FIRST, tuner.log


def test_where_no_thread_prefetches_none_will() -> None:
    pipeline = Simulated(BURSTS["bursts of output"], depths=Depths(0, 1))
    tuner = DepthTuner(Depths(0, 1), 10**9, clock=pipeline.clock)
    for _ in range(1000):
        pipeline.now += 0.1
        tuner.launched(waited=0.05, nbytes=1)
        tuner.retired(blocked=0.05, nbytes=1)
        assert tuner.depths.prefetch == 0
    assert any(line.startswith("in_flight from 1 to 2: taken back") for line in tuner.log)
    assert "no thread prefetches" in tuner.summary()[-1]


def test_no_batch_behind_grows_to_one() -> None:
    """`in_flight=0` is a depth to start from too."""
    pipeline = Simulated(BURSTS["bursts of output"], depths=Depths(2, 0))
    pipeline.tuner = DepthTuner(Depths(2, 0), 10**9, clock=pipeline.clock)
    pipeline.run(1000)
    assert pipeline.depths.in_flight > 0


def test_it_never_goes_below_the_users_depths() -> None:
    pipeline = Simulated(BURSTS["bursts of input"], depths=Depths(100, 80))
    pipeline.tuner = tuner = DepthTuner(Depths(100, 80), 10**9, clock=pipeline.clock)
    pipeline.run(1000)
    assert tuner.depths == Depths(100, 80)


@pytest.mark.parametrize("seed", range(5))
def test_where_depth_cannot_help_much_trying_it_costs_nothing(seed: int) -> None:
    generator = random.Random(seed)
    noise = [generator.uniform(0.9, 1.1) for _ in range(6000)]

    def durations(i: int) -> tuple[float, float, float]:
        return (0.020 * noise[i], 0.021 * noise[-i], 0.004)

    pipeline, tuner = tuned(durations, batches=3000)
    assert pipeline.now <= Simulated(durations).run(3000), tuner.log


@pytest.mark.smoke
@pytest.mark.parametrize("flags", [{"pipelining": "auto"}, {"pipelining": "auto", "defer_hooks": False}])
def test_predictions_and_hooks_stay_in_order(device: str, flags: dict[str, Any]) -> None:
    log, loader = HookLog(), rows(400, 2)
    assert_like_stock(HPUInferenceAccelerator(**flags), Net(), loader, callbacks=[log])
    for name in ("batch_start", "batch_end"):
        # Stock's run was recorded first.
        assert [call[2] for call in log.named(name)] == [*range(200), *range(200)]


def test_auto_is_a_flag_with_a_name() -> None:
    config = HPUInferenceAccelerator.auto(max_graphs=3).config
    assert (config.pipelining, config.max_graphs) == ("auto", 3)
    with pytest.raises(TypeError, match="`pipelining` must be True, False or 'auto', got 1"):
        InferenceConfig(pipelining=1)  # type: ignore[arg-type]


@pytest.mark.usefixtures("emulated")
def test_the_report_says_what_was_chosen(tmp_path: Any) -> None:
    accelerator = HPUInferenceAccelerator.auto(trace=tmp_path)
    predict(accelerator, Net(), rows(8, 2))
    assert accelerator.report is not None
    assert accelerator.report.tuning == ("prefetch 2, in_flight 1: too short a run to try others",)


@pytest.fixture
def slow_output() -> Iterator[None]:
    emulator.install(emulator.EmulatorConfig(program_ms=2))
    yield
    emulator.uninstall()


@pytest.mark.usefixtures("slow_output")
def test_a_run_may_change_its_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does as the tuner says, whatever it says: ever other depths, with the same predictions."""
    told: list[Depths] = []
    asked: list[int] = []
    behind: list[int] = []

    def ever_other(self: DepthTuner, **_: Any) -> None:
        self.depths = Depths(1 + (self.depths.prefetch + 2) % 5, self.depths.in_flight % 4 + 1)
        told.append(self.depths)

    def followed(self: Prefetcher[Any], depth: int) -> None:
        set_depth(self, depth)
        asked.append(depth)

    class Behind(Callback):
        """Counts the batches that were launched before the end of another."""

        begun = 0

        def on_predict_batch_start(self, *_: Any) -> None:
            self.begun += 1

        def on_predict_batch_end(self, *_: Any) -> None:
            behind.append(self.begun - len(behind) - 1)

    set_depth = Prefetcher.set_depth
    monkeypatch.setattr(DepthTuner, "retired", ever_other)
    monkeypatch.setattr(Prefetcher, "set_depth", followed)
    ours = trainer(HPUInferenceAccelerator.auto(defer_hooks=True), callbacks=[Behind()])
    expected = predict("cpu", Net(), rows(120, 2))
    actual: Any = ours.predict(Net(), rows(120, 2))
    assert len(actual) == 60
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < 1e-5
    assert set(asked) == {depths.prefetch for depths in told} == {1, 2, 3, 4, 5}
    # As many as the tuner allowed, until there are no more to launch.
    allowed = [1] + [depths.in_flight for depths in told]
    assert max(behind) == max(allowed) == 4


@pytest.mark.usefixtures("slow_output")
@pytest.mark.parametrize("slow", ["input", "output"])
def test_the_tuner_is_told_what_was_waited_for(monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    class Slow(Dataset[Tensor]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Tensor:
            time.sleep(0.02 if slow == "input" else 0.0)
            return torch.full((4,), float(index))

    def launched(self: DepthTuner, **told: float) -> None:
        waits.append(told["waited"])
        batches.append(told["nbytes"])

    def retired(self: DepthTuner, **told: float) -> None:
        blocks.append(told["blocked"])
        outputs.append(told["nbytes"])

    waits: list[float] = []
    blocks: list[float] = []
    batches: list[float] = []
    outputs: list[float] = []
    monkeypatch.setattr(DepthTuner, "launched", launched)
    monkeypatch.setattr(DepthTuner, "retired", retired)
    accelerator = HPUInferenceAccelerator.auto(hpu_graphs=False)
    ours = trainer(accelerator)
    ours.predict(Net(), DataLoader(Slow(), 2))
    assert len(batches) == 10
    assert all(2 * 4 * 4 <= size < 1000 for size in batches)  # and what the loop notes beside its tensors
    assert outputs == [2 * 3 * 4] * 10
    # A batch of slow input takes twenty times as long to prepare as it does to compute, and the other way round.
    assert (sum(waits) > sum(blocks)) == (slow == "input"), (waits, blocks)


def test_the_budget_is_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer(HPUInferenceAccelerator.auto(depth_memory=12345, prefetch=3, in_flight=2))
    ours.predict(Net(), rows(4, 2))
    tuner = vars(ours.predict_loop)["_tuner"]
    assert (tuner.depths, vars(tuner)["_budget"]) == (Depths(3, 2), 12345)
