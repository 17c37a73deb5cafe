"""Outputs that somebody overwrites before they are fetched."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline
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


class Moved:
    """An object that moves to the host by itself."""

    def __init__(self, y: Any = None) -> None:
        self.y = y

    def to(self, device: Any) -> "Moved":
        return Moved(self.y.to(device))


def fill(box: Any, y: Tensor) -> None:
    """Fill the memory of an object again, as if it were a buffer."""
    if getattr(box, "y", None) is None:
        box.y = torch.empty_like(y)
    box.y.copy_(y)


REFILLED: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], object], Callable[[Any], Any]]] = {
    "array": (lambda: np.zeros((2, 3)), lambda box, y: np.copyto(box, y.cpu().numpy()), lambda box: box.tolist()),
    "array in a dict": (
        lambda: {"y": np.zeros((2, 3))},
        lambda box, y: np.copyto(box["y"], y.cpu().numpy()),
        lambda box: box["y"].tolist(),
    ),
    "bytearray": (lambda: bytearray(1), lambda box, y: box.__setitem__(0, int(10 * y[0, 0].abs())), bytes),
    "set": (set, lambda box, y: (box.clear(), box.add(round(float(y.sum()), 2))), sorted),
    "object": (SimpleNamespace, fill, lambda box: box.y.tolist()),
    "object that moves": (Moved, fill, lambda box: box.y.tolist()),
    "object in an object": (
        lambda: SimpleNamespace(inner=SimpleNamespace()),
        lambda box, y: fill(box.inner, y),
        lambda box: box.inner.y.tolist(),
    ),
}
"""What a step may return again and again: how it is made, filled and read."""
# Some of it is on the host.
RUNS_PLAINLY = pytest.mark.filterwarnings("ignore:.*predict_step.* runs without")


class Refills(Net):
    def __init__(self, kind: str) -> None:
        super().__init__()
        make, self.fill, _ = REFILLED[kind]
        self.box = make()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.fill(self.box, self.net(batch))
        return self.box


def contents(kind: str) -> list[Any]:
    """What each batch's output shows right after its step."""
    make, filled, read = REFILLED[kind]
    boxes = []
    for y in predict("cpu", Net(), rows(16, 2)):
        boxes.append(make())
        filled(boxes[-1], y)
    return [rounded(read(box)) for box in boxes]


def rounded(data: Any) -> Any:
    return torch.tensor(data) if isinstance(data, list) and data and isinstance(data[0], list) else data


@RUNS_PLAINLY
@pytest.mark.parametrize(
    "flags",
    [{}, {"postprocess_workers": 0}, pytest.param({"pipelining": False}, marks=pytest.mark.full)],
    ids=str,
)
@pytest.mark.parametrize("kind", REFILLED)
def test_rule_7_postprocess_gets_memory_that_no_later_step_fills(kind: str, flags: dict[str, Any]) -> None:
    accelerator = HPUInferenceAccelerator(postprocess=REFILLED[kind][2], **flags)
    found = [rounded(each) for each in predict(accelerator, Refills(kind), rows(16, 2))]
    assert_equal(found, contents(kind))


@RUNS_PLAINLY
@pytest.mark.parametrize("kind", REFILLED)
def test_rule_7_writers_get_memory_that_no_later_step_fills(kind: str) -> None:
    class Reads(BasePredictionWriter):
        def write_on_batch_end(self, t: Any, m: Any, prediction: Any, *args: Any) -> None:
            found.append(rounded(REFILLED[kind][2](prediction)))

    found: list[Any] = []
    predict(HPUInferenceAccelerator(in_flight=2), Refills(kind), rows(16, 2), callbacks=[Reads("batch")])
    assert_equal(found, contents(kind))


@RUNS_PLAINLY
@pytest.mark.parametrize("in_flight", [pytest.param(None, marks=pytest.mark.full), 2])
@pytest.mark.parametrize("kind", REFILLED)
def test_rule_7_a_pipeline_gives_memory_that_no_later_batch_fills(kind: str, in_flight: int | None) -> None:
    module = Refills(kind).eval()
    config = InferenceConfig(in_flight=in_flight)
    with InferencePipeline(module, config=config) as pipeline:
        found = [rounded(REFILLED[kind][2](each)) for each in pipeline.predict(rows(16, 2))]
    assert_equal(found, contents(kind))


@pytest.mark.parametrize(
    "flags", [{}, {"defer_hooks": False}, {"postprocess_workers": 0}, {"pipelining": False}], ids=str
)
def test_postprocess_may_write_to_what_it_gets(flags: dict[str, Any]) -> None:
    class ReturnsWeights(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            layer: Any = self.net[0]
            return layer.weight.detach()

    module = ReturnsWeights()
    layer: Any = module.net[0]
    weights = layer.weight.detach().clone()
    accelerator = HPUInferenceAccelerator(postprocess=lambda weight: weight.mul_(2), **flags)
    assert_equal(predict(accelerator, module, rows(10, 2)), 5 * [2 * weights])
    assert_equal(layer.cpu().weight.detach(), weights)


class Row(Sequence[Tensor]):
    """A sequence of the user's, which Lightning builds anew."""

    def __init__(self, parts: Any) -> None:
        self.parts = list(parts)

    def __getitem__(self, index: Any) -> Any:
        return self.parts[index]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)


@pytest.mark.parametrize("flags", [{}, {"pipelining": False}, {"async_output": False}], ids=str)
def test_sequences_of_users_arrive_on_the_host(flags: dict[str, Any]) -> None:
    class Step(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"row": Row([self.net(batch), self.net(batch) * 2]), "twice": [batch, batch]}

    found = predict(HPUInferenceAccelerator(**flags), Step(), rows(10, 2))
    expected = predict("cpu", Step(), rows(10, 2))
    for one, other in zip(found, expected, strict=True):
        assert type(one["row"]) is Row
        assert_equal([list(one["row"]), one["twice"]], [list(other["row"]), other["twice"]])
