"""In which order a pipeline asks for batches and prepares them, where that could change results."""

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hpu_infer import InferenceConfig, InferencePipeline
from tests.helpers import Broken, Rows, assert_equal

pytestmark = pytest.mark.usefixtures("device")


class Counting(IterableDataset[Tensor]):
    """Yields how many steps have run."""

    steps = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(8):
            yield torch.tensor([self.steps])


class HoldsTheDataset(nn.Module):
    def __init__(self, dataset: Counting) -> None:
        super().__init__()
        self.dataset = dataset

    def forward(self, x: Tensor) -> Tensor:
        self.dataset.steps += 1
        return x * 1


class Converts(LightningModule):
    """Adds how many steps have run to each batch before it is copied."""

    steps = 0.0

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch + self.steps

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        return batch * 1


@pytest.mark.filterwarnings("ignore:A part of `predict_step` runs without an HPU graph")
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("kind", ["hook", "dataset"])
@pytest.mark.parametrize(
    "flags",
    [{}, {"prefetch": 0, "in_flight": 3}, {"pipelining": "auto"}, {"postprocess": Tensor.clone}, {"pipelining": False}],
    ids=str,
)
def test_rule_1_a_batch_that_depends_on_earlier_steps_is_prepared_after_them(
    flags: dict[str, Any], kind: str, wrapped: bool, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Counting()
    source: Any = dataset if kind == "dataset" else [torch.zeros(1)] * 8
    model = HoldsTheDataset(dataset) if kind == "dataset" else Converts()
    config = InferenceConfig(**flags)
    with caplog.at_level("INFO"), InferencePipeline(model, config=config) as pipeline:
        outputs = list(pipeline.predict(DataLoader(source, batch_size=None) if wrapped else source))
    assert torch.cat(outputs).tolist() == list(range(8))
    overlaps = flags != {"pipelining": False} and (device == "emulator" or flags != {})
    assert ("No batch is prepared ahead, since" in caplog.text) == overlaps


def test_whoever_asks_for_the_thread_gets_it(caplog: pytest.LogCaptureFixture) -> None:
    threads: set[threading.Thread] = set()

    class Seen(Converts):
        def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            threads.add(threading.current_thread())
            return batch

    with caplog.at_level("INFO"), InferencePipeline(Seen(), config=InferenceConfig(prefetch=2)) as pipeline:
        assert_equal(list(pipeline.predict(list(Rows(7).rows))), list(Rows(7).rows))
    assert threading.main_thread() not in threads
    assert "No batch is prepared ahead" not in caplog.text


# What ends the source


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, Broken])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("flags", [{}, {"prefetch": 2}, {"prefetch": 0, "in_flight": 3}], ids=str)
def test_rule_10_whatever_ends_the_source_comes_after_the_outputs_before_it(
    flags: dict[str, Any], window: int, kind: type[BaseException]
) -> None:
    def faulty() -> Iterator[dict[str, Tensor]]:
        yield from map(sentence, [3, 5, 4, 2])
        raise kind

    with torch.inference_mode():
        truth = [Lookup().predict_step(sentence(length), 0) for length in [3, 5, 4, 2]]
    config = InferenceConfig(bucket_lengths=[4, 10], pad_spec="tokenizer", hpu_graphs=False, **flags)
    found: list[Tensor] = []
    with InferencePipeline(Lookup(), config=config) as pipeline:
        with pytest.raises(kind):
            found.extend(pipeline.predict(faulty(), window=window))
        assert_equal(found, truth)
        assert_equal(list(pipeline.predict([sentence(3)])), truth[:1])


def test_ctrl_c_while_a_batch_is_awaited_ends_it_at_once() -> None:
    """Results that are there are not handed out first, and the thread ends."""
    waits, goes_on = threading.Event(), threading.Event()

    def source() -> Iterator[Tensor]:
        yield from Rows(2).rows
        waits.set()
        assert goes_on.wait(60)

    def interrupt() -> None:
        assert waits.wait(60)
        signal.raise_signal(signal.SIGINT)
        goes_on.set()

    found: list[Tensor] = []
    with InferencePipeline(nn.Identity(), config=InferenceConfig(prefetch=4, in_flight=3)) as pipeline:
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            found.extend(pipeline.predict(source()))
        interrupter.join()
    assert found == []


# Errors within a window


class Lookup(LightningModule):
    """Sums of what sentences stand for, without their padding."""

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.broken = broken
        self.table = nn.Embedding.from_pretrained(torch.arange(20.0).reshape(10, 2))

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if self.broken == "hook" and batch["input_ids"].shape[1] == 5:
            raise Broken
        return batch

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self.table(batch["input_ids"]) * batch["attention_mask"].unsqueeze(-1)).sum(1)


def sentence(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.full((2, length), length), "attention_mask": torch.ones(2, length)}


BAD_BATCHES: dict[str, dict[str, Tensor]] = {
    "length": {"x": torch.ones(2, 5)},
    "padding": sentence(5) | {"attention_mask": torch.ones(2, 4)},
    "step": sentence(5) | {"attention_mask": torch.ones(1, 5, 1)},
}


@pytest.mark.filterwarnings("ignore:A part of `predict_step` runs without an HPU graph")
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("window", [1, 4, 6, 100])
@pytest.mark.parametrize("fault", ["batches", "hook", *BAD_BATCHES])
def test_rule_10_within_a_window_an_error_comes_after_the_outputs_before_it(
    fault: str, window: int, prefetch: int
) -> None:
    lengths = [3, 9, 4, 7, 2, 5, 6, 8, 1]

    def faulty() -> Iterator[dict[str, Tensor]]:
        for length in lengths:
            if fault == "batches" and length == 5:
                raise Broken
            yield BAD_BATCHES.get(fault, sentence(length)) if length == 5 else sentence(length)

    with torch.inference_mode():
        truth = [Lookup().predict_step(sentence(length), 0) for length in lengths]
    config = InferenceConfig(bucket_lengths=[4, 10], pad_spec="tokenizer", prefetch=prefetch, hpu_graphs=False)
    found: list[Tensor] = []
    with InferencePipeline(Lookup(fault), config=config) as pipeline:
        with pytest.raises(Exception) as raised:  # noqa: PT011 (each fault has its own)
            found.extend(pipeline.predict(faulty(), window=window))
        assert_equal(found, truth[:5])
        assert_equal(list(pipeline.predict([sentence(3)])), truth[:1])
    assert isinstance(
        raised.value, {"length": ValueError, "padding": ValueError, "step": RuntimeError}.get(fault, Broken)
    )
