"""Depths that are chosen while the pipeline runs."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, emulator
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

    def run(self, batches: int, nbytes: int = 1) -> float:
        """Seconds for that many batches."""
        taken: list[float] = []  # when the main thread took each prepared batch
        prepared: list[float] = []
        done: list[float] = []  # when the device had computed each batch
        retired = 0
        blocked = 0.0
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
                self.depths = self.tuner.launched(waited=waited, blocked=blocked, nbytes=nbytes) or self.depths
                blocked = 0.0
            while i - retired >= self.depths.in_flight:
                blocked += max(0.0, done[retired] - self.now)
                self._retire(done, retired)
                retired += 1
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


@pytest.mark.parametrize(("mix", "knob"), [("bursts of input", "prefetch"), ("bursts of output", "in_flight")])
def test_it_deepens_where_the_waiting_is_and_says_so(mix: str, knob: str) -> None:
    pipeline, tuner = tuned(BURSTS[mix])
    assert getattr(pipeline.depths, knob) > getattr(FIRST, knob)
    assert any(line.startswith(f"{knob} from ") and "kept" in line for line in tuner.log)


def test_rule_10_the_budget_bounds_the_depths() -> None:
    pipeline, tuner = tuned(BURSTS["bursts of input"], budget=4)
    # Two ahead, one behind and the one that runs are four bytes.
    assert pipeline.depths == FIRST
    assert tuner.log == [
        "no prefetch from 2 to 4: 4 bytes do not suffice",
        "no in_flight from 1 to 2: 4 bytes do not suffice",
    ]


def test_no_batch_behind_grows_to_one() -> None:
    """`in_flight=0` is a depth to start from too."""
    pipeline = Simulated(BURSTS["bursts of output"], depths=Depths(2, 0))
    pipeline.tuner = DepthTuner(Depths(2, 0), 10**9, clock=pipeline.clock)
    pipeline.run(1000)
    assert pipeline.depths.in_flight > 0


def test_noise_does_not_let_it_run_away() -> None:
    generator = random.Random(0)
    noise = [generator.uniform(0.9, 1.1) for _ in range(6000)]
    pipeline, tuner = tuned(lambda i: (0.020 * noise[i], 0.021 * noise[-i], 0.004), batches=3000)
    assert pipeline.depths.prefetch <= 8, tuner.log
    assert pipeline.depths.in_flight <= 4, tuner.log


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
    assert accelerator.report.tuning == ("prefetch 2, in_flight 1: nothing was worth a change",)


@pytest.fixture
def slow_output() -> Iterator[None]:
    emulator.install(emulator.EmulatorConfig(program_ms=2))
    yield
    emulator.uninstall()


@pytest.mark.usefixtures("slow_output")
def test_a_run_may_change_its_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does as the tuner says, whatever it says: ever other depths, with the same predictions."""

    def ever_other(self: DepthTuner, **_: Any) -> Depths:
        self.depths = Depths(1 + (self.depths.prefetch + 2) % 5, self.depths.in_flight % 4 + 1)
        return self.depths

    monkeypatch.setattr(DepthTuner, "launched", ever_other)
    ours = trainer(HPUInferenceAccelerator.auto())
    expected = predict("cpu", Net(), rows(120, 2))
    actual: Any = ours.predict(Net(), rows(120, 2))
    assert len(actual) == 60
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() < 1e-5
