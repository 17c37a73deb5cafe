"""The engine without a Trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hpu_infer import InferenceConfig, InferencePipeline, emulator
from lightning_hpu_infer.lengths.pad import PadSpec
from lightning_hpu_infer.observer import Lane, Stage
from tests.helpers import Broken, Net, Rows, assert_equal

pytestmark = pytest.mark.usefixtures("device")

CONFIGS = [
    InferenceConfig(),
    InferenceConfig(in_flight=3, prefetch=5),
    InferenceConfig(prefetch=0, in_flight=0),
    InferenceConfig(hpu_graphs=False),
    InferenceConfig(pipelining=False),
    InferenceConfig(hpu_graphs=False, async_copy=False, pipelining=False),
]


def batches(number: int = 7) -> list[Tensor]:
    return [Rows(number).rows[i : i + 1] for i in range(number)]


def expected(number: int = 7) -> list[Tensor]:
    net = Net().net
    with torch.inference_mode():
        return [net(batch) for batch in batches(number)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_outputs_come_in_order_and_equal_the_models(config: InferenceConfig) -> None:
    with InferencePipeline(Net().net, config=config) as pipeline:
        assert_equal(list(pipeline.predict(batches())), expected())
        assert_equal(list(pipeline.predict(iter(batches(3)))), expected(3))


def test_push_and_pop_by_hand() -> None:
    with InferencePipeline(Net().net) as pipeline:
        results = []
        for batch in batches():
            pipeline.push(batch)
            if len(pipeline) > 2:
                results.append(pipeline.pop())
        while pipeline:
            results.append(pipeline.pop())
        assert_equal(results, expected())
        with pytest.raises(IndexError, match=r"Nothing is in flight: every batch .* Push one first"):
            pipeline.pop()


def test_it_runs_on_the_hpu_if_there_is_one(device: str) -> None:
    with InferencePipeline(Net().net) as pipeline:
        assert pipeline.device.type == ("hpu" if device == "emulator" else "cpu")
        next(iter(pipeline.predict(batches())))


def test_closing_gives_the_model_back() -> None:
    net = Net().net
    with InferencePipeline(net) as pipeline:
        list(pipeline.predict(batches()))
    assert "forward" not in vars(net)


def test_an_error_of_the_batches_surfaces_and_the_pipeline_goes_on() -> None:
    def faulty() -> Any:
        yield from batches(3)
        raise Broken("batch 3")

    with InferencePipeline(Net().net) as pipeline:
        with pytest.raises(Broken):
            list(pipeline.predict(faulty()))
        assert_equal(list(pipeline.predict(batches())), expected())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("fault", ["batches", "model"])
def test_rule_10_an_error_comes_after_the_outputs_before_it(config: InferenceConfig, fault: str) -> None:
    def faulty() -> Iterator[Tensor]:
        for index, batch in enumerate(batches()):
            if index == 5:
                if fault == "batches":
                    raise Broken("batch 5")
                yield torch.zeros(1, 3)
            yield batch

    found: list[Tensor] = []
    with InferencePipeline(Net().net, config=config) as pipeline:
        with pytest.raises(Broken if fault == "batches" else RuntimeError, match=r"batch 5|shapes|reduction dim"):
            found.extend(pipeline.predict(faulty()))
        assert_equal(found, expected()[:5])
        assert_equal(list(pipeline.predict(batches())), expected())


def test_rule_9_pushing_has_a_bound_that_raises_or_waits() -> None:
    with InferencePipeline(Net().net, max_pending=3, when_full="raise") as pipeline:
        for batch in batches(3):
            pipeline.push(batch)
        with pytest.raises(RuntimeError, match=r"full: 3 batches .*`max_pending`.*Pop the oldest.*`when_full='wait'`"):
            pipeline.push(batches()[3])
        found = [pipeline.pop()]
        pipeline.push(batches()[3])
        assert len(pipeline) == 3
        assert_equal(found + [pipeline.pop() for _ in range(3)], expected(4))
    with InferencePipeline(Net().net, max_pending=2, when_full="wait") as pipeline:
        for batch in batches():
            pipeline.push(batch)
        assert len(pipeline) == 7
        assert_equal([pipeline.pop() for _ in range(7)], expected())
        with pytest.raises(IndexError, match="Nothing is in flight"):
            pipeline.pop()
    with pytest.raises(ValueError, match="`max_pending` must be 1 or more, got 0"):
        InferencePipeline(Net().net, max_pending=0)
    with pytest.raises(ValueError, match="`when_full` must be 'raise' or 'wait', got 'block'"):
        InferencePipeline(Net().net, when_full="block")  # type: ignore[arg-type]


def test_rule_8_closing_early_drops_what_is_in_flight(device: str) -> None:
    with InferencePipeline(Net().net, config=InferenceConfig(in_flight=3, hpu_graphs=False)) as pipeline:
        outputs = pipeline.predict(batches())
        found = next(outputs)
        outputs.close()  # type: ignore[attr-defined]
        assert_equal([found, *pipeline.predict(batches()[1:])], expected())


def test_leaving_early_ends_the_thread() -> None:
    with InferencePipeline(Net().net) as pipeline:
        outputs = pipeline.predict(batches())
        assert_equal(next(outputs), expected()[0])
        outputs.close()  # type: ignore[attr-defined]  # the guard in conftest.py sees a thread that stays


def test_rule_3_a_popped_output_is_not_overwritten(device: str) -> None:
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.net(x)}

    with InferencePipeline(Dictionary()) as pipeline:
        assert_equal([output["scores"] for output in pipeline.predict(batches())], expected())
        if device == "emulator":
            assert emulator.stats().captures == 1


def test_outputs_of_one_run_do_not_reach_the_next() -> None:
    def faulty() -> Any:
        yield from batches(3)
        raise Broken("batch 3")

    with InferencePipeline(Net().net, config=InferenceConfig(in_flight=2)) as pipeline:
        outputs = pipeline.predict(batches())
        next(outputs)
        outputs.close()  # type: ignore[attr-defined]
        assert_equal(list(pipeline.predict(batches(3))), expected(3))
        with pytest.raises(Broken):
            list(pipeline.predict(faulty()))
        assert_equal(list(pipeline.predict(batches(3))), expected(3))


def test_predict_and_push_do_not_mix() -> None:
    with InferencePipeline(Net().net) as pipeline:
        pipeline.push(batches()[3])
        assert_equal(list(pipeline.predict(batches(3))), expected(3))
        assert_equal(pipeline.pop(), expected()[3])


def test_a_closed_pipeline_says_so() -> None:
    net = Net().net
    pipeline = InferencePipeline(net)
    outputs = pipeline.predict(batches())
    next(outputs)
    pipeline.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(outputs)
    with pytest.raises(RuntimeError, match="closed"):
        pipeline.push(batches()[0])
    assert "forward" not in vars(net)


@pytest.mark.parametrize("graph_modules", [None, ["0", "2"]])
@pytest.mark.parametrize("first_closed", [0, 1])
def test_two_pipelines_on_one_model_are_both_right_whichever_is_closed_first(
    first_closed: int, graph_modules: list[str] | None
) -> None:
    net = Net().net.eval()

    def attributes() -> list[dict[str, Any]]:
        return [
            {
                name: list(value.items()) if isinstance(value, dict) else value
                for name, value in vars(module).items()
                if name not in ("_parameters", "_buffers")  # which are on the device now
            }
            for module in net.modules()
        ]

    before = attributes()
    pipelines = [InferencePipeline(net, config=InferenceConfig(graph_modules=graph_modules)) for _ in range(2)]
    for _ in range(2):
        for pipeline in pipelines:
            assert_equal(list(pipeline.predict(batches())), expected())
    pipelines[first_closed].close()
    assert_equal(list(pipelines[1 - first_closed].predict(batches())), expected())
    pipelines[1 - first_closed].close()
    assert attributes() == before
    with InferencePipeline(net) as third:
        assert_equal(list(third.predict(batches())), expected())


def test_an_option_that_needs_a_trainer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`group_by_length` needs a Trainer, got 'text'. Pass `window` to `predict`"):
        InferencePipeline(nn.Linear(2, 2), config=InferenceConfig(group_by_length="text"))


# Lengths


class Words(nn.Module):
    """One sum per sentence, which padding does not change, and one number per word."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.arange(20.0).reshape(10, 2))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        words = self.table(batch["input_ids"]) * batch["attention_mask"].unsqueeze(-1)
        return {"sums": words.sum(1), "words": words}


def sentences(lengths: list[int]) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": torch.arange(length).remainder(9).add(1).repeat(2, 1), "attention_mask": torch.ones(2, length)}
        for length in lengths
    ]


LENGTHS = [3, 9, 4, 7, 9, 2, 6, 5, 1, 8, 8, 3]
WORDS = PadSpec.tokenizer(words=1)


@pytest.mark.parametrize("window", [1, 5, 100])
@pytest.mark.parametrize(
    "flags",
    [
        {"bucket_lengths": [4, 10], "pad_spec": WORDS},
        {"bucket_lengths": [4, 10], "pad_spec": WORDS, "warm_up": True, "in_flight": 3, "prefetch": 2},
        {"lengths": "auto", "pad_spec": WORDS, "bucket_multiple": 4},
        {"lengths": "auto", "pad_spec": WORDS, "bucket_multiple": 4, "pipelining": False},
    ],
    ids=str,
)
def test_batches_are_padded_to_buckets_and_outputs_cut(flags: dict[str, Any], window: int, device: str) -> None:
    with torch.inference_mode():
        truth = [Words()(batch) for batch in sentences(LENGTHS)]
    shapes: set[Any] = set()

    class Seen(Words):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            shapes.add(tuple(batch["input_ids"].shape))
            return super().forward(batch)

    config = InferenceConfig(**flags)
    with InferencePipeline(Seen(), config=config) as pipeline:
        assert_equal(list(pipeline.predict(sentences(LENGTHS), window=window)), truth)
        futures = [pipeline.submit(batch) for batch in sentences(LENGTHS)]
        assert_equal([future.result(60) for future in futures], truth)
    assert shapes == {(2, 4), (2, 10)} if "lengths" not in flags else {(2, 4), (2, 8), (2, 12)}


def test_a_window_keeps_batches_of_a_loader_that_fills_its_memory_again(device: str) -> None:
    ids = torch.zeros(2, 9, dtype=torch.int64)

    def refilled() -> Iterator[dict[str, Tensor]]:
        for batch in sentences(LENGTHS):
            view = ids[:, : batch["input_ids"].shape[1]]
            yield {"input_ids": view.copy_(batch["input_ids"]), "attention_mask": batch["attention_mask"]}

    with torch.inference_mode():
        truth = [Words()(batch) for batch in sentences(LENGTHS)]
    for pipelining in (True, False):
        config = InferenceConfig(lengths="auto", pad_spec=WORDS, pipelining=pipelining)
        with InferencePipeline(Words(), config=config) as pipeline:
            assert_equal(list(pipeline.predict(refilled(), window=4)), truth)


def test_a_window_needs_lengths() -> None:
    with InferencePipeline(Net().net) as pipeline:
        with pytest.raises(ValueError, match="`window` puts batches in order of length, which `pad_spec` tells"):
            pipeline.predict(batches(), window=4)
        with pytest.raises(ValueError, match="`window` must be 1 or more, got 0"):
            pipeline.predict(batches(), window=0)


# Observation and depths


def test_a_trace_has_all_that_the_pipeline_did(tmp_path: Path, device: str) -> None:
    with InferencePipeline(Net().net, config=InferenceConfig(trace=tmp_path, postprocess=torch.clone)) as pipeline:
        list(pipeline.predict(batches()))
        pipeline.submit(batches()[0]).result(60)
        assert pipeline.report is None
    report = pipeline.report
    assert report is not None
    assert report.batches == 8
    assert report.counters.captures == (1 if device == "emulator" else 0)
    stages = {(stage.lane, stage.stage) for stage in report.stages}
    assert stages >= {
        (Lane.PREFETCH, Stage.FETCH),
        (Lane.PREFETCH, Stage.PREPARE),
        (Lane.MAIN, Stage.WAIT_INPUT),
        (Lane.MAIN, Stage.LAUNCH),
        (Lane.MAIN, Stage.COPY_OUT),
        (Lane.POSTPROCESS, Stage.POSTPROCESS),
    }
    assert ((Lane.DEVICE, Stage.DEVICE) in stages) == (device == "emulator")
    assert (tmp_path / "report.json").exists()


def test_depths_rise_during_predict_and_fall_back_for_single_batches(tmp_path: Path) -> None:
    """A source in bursts: preparing further ahead pays, and the report says with which depths it ended."""
    config = InferenceConfig(pipelining="auto", trace=tmp_path, hpu_graphs=False)
    with InferencePipeline(Net().net, config=config) as pipeline:
        assert_equal(list(pipeline.predict(batches() * 20)), expected() * 20)
        assert_equal(list(pipeline.predict(batches())), expected())
        assert_equal(pipeline.submit(batches()[1]).result(60), expected()[1])
    assert pipeline.report is not None
    assert pipeline.report.tuning
