"""Outputs that somebody overwrites before they are fetched."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.helpers import Net, Writer, assert_equal, predict, rows

pytestmark = pytest.mark.usefixtures("device")


@dataclass
class Scores:
    scores: Tensor


class Reuses(Net):
    """Fills a buffer of its own in every step and returns it, whole or in part, as some hand-tuned models do."""

    buffer: Tensor

    def __init__(self, show: Any) -> None:
        super().__init__()
        self.register_buffer("buffer", torch.zeros(2, 3))
        self.show = show

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.buffer.copy_(self.net(batch))
        return self.show(self.buffer)


SHOWS = {
    "whole": lambda buffer: buffer,
    "a view": lambda buffer: buffer[:, 1:],
    "in a dict": lambda buffer: {"scores": [buffer]},
    "in a dataclass": lambda buffer: Scores(buffer),
}


@pytest.mark.parametrize("defer_hooks", [True, False])
@pytest.mark.parametrize("show", SHOWS)
def test_a_buffer_that_the_step_reuses_is_returned_as_it_was(show: str, defer_hooks: bool) -> None:
    expected = [SHOWS[show](scores) for scores in predict("cpu", Net(), rows(10, 2))]
    accelerator = HPUInferenceAccelerator(in_flight=3, defer_hooks=defer_hooks)
    actual = predict(accelerator, Reuses(SHOWS[show]), rows(10, 2))
    if show == "in a dataclass":
        actual, expected = [[each.scores for each in outputs] for outputs in (actual, expected)]
    assert_equal(actual, expected)


@pytest.mark.parametrize("show", ["whole", "in a dict"])
def test_on_the_cpu_a_buffer_that_the_step_reuses_is_one_object_in_all_predictions_as_in_stock(
    show: str, device: str
) -> None:
    if device != "cpu":
        pytest.skip("a device's memory is copied to the host for each prediction")
    expected = predict("cpu", Reuses(SHOWS[show]), rows(10, 2))
    assert_equal(predict(HPUInferenceAccelerator(hpu_graphs=False), Reuses(SHOWS[show]), rows(10, 2)), expected)


def test_a_buffer_that_the_step_reuses_is_written_as_it_was() -> None:
    writer, expected = Writer("batch"), Writer("batch")
    predict("cpu", Net(), rows(10, 2), callbacks=[expected])
    predict(HPUInferenceAccelerator(in_flight=3), Reuses(SHOWS["whole"]), rows(10, 2), callbacks=[writer])
    assert_equal(writer.batches, expected.batches)
