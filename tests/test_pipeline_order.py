"""In which order a pipeline asks for batches and prepares them, where that could change results."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_hpu_infer import InferenceConfig, InferencePipeline
from tests.helpers import Rows, assert_equal

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
    [{}, {"prefetch": 0, "in_flight": 3}, {"pipelining": "auto"}, {"postprocess": torch.clone}, {"pipelining": False}],
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
