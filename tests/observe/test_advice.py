"""The next thing to change: what is proposed for which bottleneck, and what is not."""

import pytest

from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.observe.advice import Setup
from lightning_hpu_infer.observe.analyse import analyse
from lightning_hpu_infer.observe.report import Counters
from lightning_hpu_infer.observe.spans import Span
from lightning_hpu_infer.observer import Lane, Stage
from tests.observe.simulate import CASES, LAUNCH, OFF, ON, S, Times, pipelined, stock


@pytest.mark.parametrize(
    ("times", "config", "counters", "advice"),
    [
        (LAUNCH, ON, Counters(captures=20, replays=20, evictions=4), "`max_graphs` (now 16)"),
        (LAUNCH, ON, Counters(captures=1, replays=20, plain_calls=20), "larger batches"),
        (LAUNCH, ON, Counters(captures=1, replays=20, plain_calls=22, verified=2), "21 of 41 calls"),
        (LAUNCH, ON, Counters(captures=1, replays=20, plain_calls=21, verified=2), "larger batches"),
        (LAUNCH, InferenceConfig(pipelining=False), Counters(), "`pipelining=True`"),
        (LAUNCH, ON, Counters(replays=40, breaks={"a read, at a.py:3": 1}), "it is cut there: a read, at a.py:3."),
        (LAUNCH, InferenceConfig(in_flight=0), Counters(), "`in_flight=1`"),
        (Times({S.FETCH: 9, S.DEVICE: 4}), InferenceConfig(prefetch=0), Counters(), "`prefetch=2`"),
        (Times({S.FETCH: 9, S.DEVICE: 4}), ON, Counters(), "From 0 workers, go to 3"),
        (
            Times({S.COPY_OUT: 9, S.END_HOOKS: 9, S.DEVICE: 4}),
            InferenceConfig(async_output=False),
            Counters(),
            "`async_output=True`",
        ),
        (Times({S.COPY_OUT: 0.5, S.END_HOOKS: 9, S.DEVICE: 4}), ON, Counters(), "end hooks cheaper"),
        (
            Times({S.COPY_OUT: 9, S.END_HOOKS: 9, S.DEVICE: 4}),
            ON,
            Counters(),
            "end hooks cheaper",
        ),
        (
            LAUNCH,
            InferenceConfig(graph_memory=7),
            Counters(captures=9, evictions=4),
            "`max_graphs` (now 16) or `graph_memory` (now 7)",
        ),
        (Times({S.COPY_OUT: 9, S.DEVICE: 4}), InferenceConfig(in_flight=0), Counters(), "`in_flight=1`"),
        (Times({S.END_HOOKS: 9, S.DEVICE: 4}), InferenceConfig(defer_hooks=False), Counters(), "`defer_hooks=True`"),
    ],
)
def test_advice_names_what_is_not_done_yet(
    times: Times, config: InferenceConfig | None, counters: Counters, advice: str
) -> None:
    in_flight = config.in_flight_depth("hpu") if config else 0
    assert advice in analyse(pipelined(40, times, in_flight), config=config, counters=counters).advice


def test_uneven_stages_ask_for_deeper_queues() -> None:
    # The thread works less than the 5 ms of the device per batch, and yet the device waits.
    gap = [Span(S.DEVICE, Lane.DEVICE, k * 6e-3, k * 6e-3 + 5e-3, k) for k in range(40)]
    wait = [Span(S.WAIT_INPUT, Lane.MAIN, k * 6e-3 + 4e-3, k * 6e-3 + 6e-3, k) for k in range(40)]

    def fetching(ms: float) -> list[Span]:
        ends = [(k + 1) * 6e-3 for k in range(40)]
        return [*gap, *wait, *(Span(S.FETCH, Lane.PREFETCH, end - ms / 1e3, end, k) for k, end in enumerate(ends))]

    for ms, deeper in ((3, True), (4.9, True), (5.1, False)):
        assert ("Raise `prefetch` to 4" in analyse(fetching(ms), config=ON).advice) is deeper
    assert "`prefetch` to 1024" in analyse(fetching(3), config=InferenceConfig(prefetch=600)).advice
    hooks = [Span(S.END_HOOKS, Lane.MAIN, k * 6e-3 + 4e-3, k * 6e-3 + 6e-3, k) for k in range(40)]
    assert "Raise `in_flight` to 2" in analyse(gap + hooks, config=ON).advice
    # Not where it was tried, or may not be.
    for config in (InferenceConfig(pipelining="auto"), InferenceConfig(prefetch=1024, in_flight=1024)):
        assert "`num_workers`" in analyse(fetching(3), config=config).advice
        assert "end hooks cheaper" in analyse(gap + hooks, config=config).advice


@pytest.mark.parametrize(("batches", "plain"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 3)])
def test_calls_that_no_graph_could_be_made_for_yet_are_no_fault(batches: int, plain: int) -> None:
    counters = Counters(
        plain_calls=plain, captures=batches > 2, verified=max(0, min(batches - 2, 2)), replays=max(0, batches - 3)
    )
    report = analyse(pipelined(batches, LAUNCH), config=ON, counters=counters)
    assert "without a graph" not in report.advice
    hooks = analyse(pipelined(batches, Times({S.START_HOOKS: 9, S.DEVICE: 2})), config=ON, counters=counters)
    assert "without a graph" not in hooks.advice


def test_what_is_on_or_has_no_effect_is_not_proposed() -> None:
    fetch = Times({S.FETCH: 9, S.DEVICE: 4})
    half = analyse(stock(40, fetch), config=InferenceConfig(prefetch=0), setup=Setup(precision="bf16-true"))
    assert "`num_workers`" in half.advice
    for precision, proposed in (("32-true", True), ("bf16-true", False), ("bf16-mixed", False), ("16-mixed", False)):
        busy = analyse(pipelined(40, Times({S.DEVICE: 9})), config=ON, setup=Setup(precision=precision))
        assert ("`precision='bf16-true'`" in busy.advice) is proposed
    for shown in (True, False):
        slow = pipelined(40, Times({S.END_HOOKS: 9, S.DEVICE: 4}))
        advice = analyse(slow, config=ON, setup=Setup(progress_bar=shown)).advice
        assert ("`enable_progress_bar=False`" in advice) is shown


def test_workers_are_no_more_than_cores() -> None:
    slow = pipelined(40, Times({S.FETCH: 89, S.DEVICE: 2}))
    assert "From 0 workers, go to 45" in analyse(slow, config=ON).advice
    report = analyse(slow, config=ON, setup=Setup(cores=6))
    assert (
        "From 0 workers, go to 6; from more, to 6 times as many, but to no more than the machine's 6" in report.advice
    )


ON_THE_HOST = {
    S.FETCH: "`num_workers`",
    S.PREPARE: "`on_before_batch_transfer`",
    S.COPY_IN: "`on_after_batch_transfer` cheaper",
    S.START_HOOKS: "`on_predict_batch_start`",
    S.CAPTURE: "more batches",
    S.LAUNCH: "predict on an HPU",
    S.END_HOOKS: "end hooks cheaper",
}


@pytest.mark.parametrize("config", [ON, OFF, InferenceConfig(prefetch=0), InferenceConfig(in_flight=0)])
@pytest.mark.parametrize("stage", ON_THE_HOST)
def test_on_the_cpu_no_flag_is_proposed(stage: Stage, config: InferenceConfig) -> None:
    spans = [Span(stage, Lane.MAIN, k, k + 0.7, k) for k in range(10)]
    report = analyse(spans, config=config, measured_on="cpu")
    assert ON_THE_HOST[stage] in report.advice
    assert "=True" not in report.advice
    assert "`prefetch" not in report.advice


@pytest.mark.parametrize("name", CASES)
def test_no_flag_of_ours_is_proposed_to_a_run_of_another_program(name: str) -> None:
    for spans in (stock(40, CASES[name][0]), pipelined(40, CASES[name][0])):
        advice = analyse(spans, measured_on="NVIDIA A100").advice
        for flag in ("=True", "prefetch", "in_flight", "`bucket_lengths`", "`max_graphs`"):
            assert flag not in advice
    between = [Span(S.DEVICE, Lane.DEVICE, k, k + 0.5, k) for k in range(9)]
    launched = [Span(S.LAUNCH, Lane.MAIN, k - 0.5, k, k) for k in range(9)]
    for measured_on, ours in (("NVIDIA A100", False), ("HPU GAUDI2", True)):
        for spans in (between, between + launched):
            assert ("`hpu_graphs=True`" in analyse(spans, measured_on=measured_on).advice) is ours
