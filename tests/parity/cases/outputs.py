"""Steps: what they return, what they change, and which arguments they take."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers.modeling_outputs import BaseModelOutput

from tests.helpers import Net, rows
from tests.parity.cases.registry import NamedScores, Stepped, case
from tests.parity.recorder import Case


@case(
    captures=1,
    replays=0,
    warns=("`predict_step` as a whole runs without a graph .* nothing in it that TorchDynamo can trace.*: `net`",),
)
def outputs_of_none() -> Case:
    return Case(Stepped(lambda m, x, i: None if i % 2 else m.net(x)), rows(10, 2))


@case(captures=0, replays=0)
def outputs_of_strings_and_numbers() -> Case:
    return Case(Stepped(lambda m, x, i: [f"batch {i}", i, 1.5, True, b"x", {"set"}]), rows(8, 2))


@case(captures=1, replays=2)
def nested_outputs() -> Case:
    return Case(Stepped(lambda m, x, i: {"a": [m.net(x), (x, i)], "b": {"c": m.net(x)[:, 0], "d": ()}}), rows(8, 2))


@case(captures=1, replays=2)
def outputs_of_other_dtypes() -> Case:
    def step(m: Net, x: Tensor, i: int) -> Any:
        scores = m.net(x)
        return scores.argmax(1), scores > 0, scores.half(), scores.double(), scores.to(torch.int32), scores[:0]

    return Case(Stepped(step), rows(8, 2))


@dataclass
class Scores:
    scores: Tensor
    name: str


@case(captures=2, replays=1)
def outputs_of_dataclasses() -> Case:
    return Case(Stepped(lambda m, x, i: Scores(m.net(x), f"batch {i}")), rows(8, 2))


@case(captures=1, replays=2)
def outputs_of_named_tuples() -> Case:
    return Case(Stepped(lambda m, x, i: NamedScores(m.net(x), i)), rows(8, 2))


@case(captures=1, replays=2)
def outputs_of_model_outputs() -> Case:
    def step(m: Net, x: Tensor, i: int) -> Any:
        return BaseModelOutput(last_hidden_state=m.net(x), hidden_states=(x, x + 1))

    return Case(Stepped(step), rows(8, 2))


@case(captures=1, replays=2)
def outputs_on_the_host_already() -> Case:
    return Case(Stepped(lambda m, x, i: m.net(x).cpu()), rows(8, 2))


@case(captures=0, replays=0)
def outputs_that_are_the_input() -> Case:
    return Case(Stepped(lambda m, x, i: (x, x[:, 1:], x.t())), rows(8, 2))


@case(captures=1, replays=2)
def outputs_that_are_weights() -> Case:
    return Case(Stepped(lambda m, x, i: (m.net(x), m.net[0].weight.detach(), m.net[0].bias)), rows(8, 2))


@case(captures=2, replays=0)
def outputs_that_depend_on_the_index() -> Case:
    return Case(Stepped(lambda m, x, i: m.net(x) * i), rows(12, 2))


@case(captures=1, replays=2)
def expanded_and_strided_outputs() -> Case:
    return Case(Stepped(lambda m, x, i: (m.net(x)[:, :1].expand(-1, 3), m.net(x).t(), m.net(x)[:, ::2])), rows(8, 2))


class Counting(Net):
    """Changes a buffer in every step."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.count += 1
        return self.net(batch) + self.count


@case(captures=1, replays=4)
def a_buffer_that_counts() -> Case:
    return Case(Counting(), rows(12, 2))


class WithMetric(Net):
    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = self.net(batch)
        return scores, self.metric(scores)


@case(
    captures=8,
    replays=4,
    warns=("`predict_step` as a whole runs without a graph .* uses a Python value that changes.*: `net`",),
)
def a_metric_in_the_step() -> Case:
    return Case(WithMetric(), rows(12, 2))


class Dropping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))


@case(captures=1, replays=4)
def training_mode_is_left_and_restored() -> Case:
    return Case(Dropping(), rows(12, 2))


@case(captures=1, replays=4)
def a_mix_of_modes_is_restored() -> Case:
    module = Dropping()
    module.net[2].eval()
    return Case(module, rows(12, 2))


class OnlyBatch(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net().net

    def predict_step(self, batch: Any) -> Any:
        return self.net(batch)


@case(captures=1, replays=2)
def a_step_without_batch_idx() -> Case:
    return Case(OnlyBatch(), rows(8, 2))


class AnyArguments(OnlyBatch):
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(args[0]), args[1:]


@case(captures=2, replays=3)
def a_step_of_any_arguments() -> Case:
    return Case(AnyArguments(), [rows(8, 2), rows(4, 2)])


class NoLoaderIndex(OnlyBatch):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return self.net(batch)


@case(captures=0, replays=0)
def a_step_without_loader_index_for_several_loaders_is_refused() -> Case:
    return Case(NoLoaderIndex(), [rows(8, 2), rows(4, 2)])


class DefaultStep(Net):
    """Lightning's own `predict_step` calls the module."""

    predict_step = LightningModule.predict_step

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@case(captures=1, replays=2)
def the_default_step() -> Case:
    return Case(DefaultStep(), rows(8, 2))


class LogsInStep(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("x", 1.0)


@case(captures=0, replays=0)
def logging_in_the_step_is_refused() -> Case:
    return Case(LogsInStep(), rows(8, 2))


@case(captures=2, replays=0)
def a_step_that_stops_the_run() -> Case:
    def step(m: Net, x: Tensor, i: int) -> Any:
        if i == 3:
            raise StopIteration
        return m.net(x)

    return Case(Stepped(step), rows(12, 2))
