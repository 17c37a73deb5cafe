"""What users bring to `trainer.predict`: each function makes one case, with fresh objects."""

import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.profilers import PyTorchProfiler
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torchmetrics import MeanMetric
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from tests.helpers import Net, Rows, rows
from tests.parity.recorder import Case

CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


class Stepped(Net):
    """A module whose step is a function of module, batch and index."""

    def __init__(self, step: Callable[..., Any]) -> None:
        super().__init__()
        self.step = step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.step(self, batch, batch_idx)


class Stream(IterableDataset[Tensor]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Tensor]:
        return iter(Rows(self.length).rows)


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.length


class Items(Dataset[Any]):
    def __init__(self, make: Callable[[Tensor, int], Any], length: int = 9) -> None:
        self.make, self.rows = make, Rows(length).rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.make(self.rows[index], index)


def items(make: Callable[[Tensor, int], Any], length: int = 9, **options: Any) -> DataLoader[Any]:
    return DataLoader(Items(make, length), **({"batch_size": 2} | options))


# Loaders


@case
def plain() -> Case:
    return Case(Net(), rows(10, 2))


@case
def uneven_last_batch() -> Case:
    return Case(Net(), rows(11, 3))


@case
def one_batch() -> Case:
    return Case(Net(), rows(2, 2))


@case
def two_batches() -> Case:
    return Case(Net(), rows(4, 2))


@case
def several_loaders() -> Case:
    return Case(Net(), [rows(6, 2), rows(5, 3), rows(1, 1)])


@case
def a_tuple_of_loaders() -> Case:
    return Case(Net(), (rows(6, 2), rows(4, 2)))


@case
def a_dict_of_loaders() -> Case:
    return Case(Net(), {"a": rows(6, 2), "b": rows(4, 1)})


@case
def combined_loader() -> Case:
    return Case(Net(), CombinedLoader([rows(6, 2), rows(5, 2)], "sequential"))


@case
def combined_loader_in_another_mode_is_refused() -> Case:
    return Case(Net(), CombinedLoader([rows(6, 2), rows(5, 2)], "max_size"))


@case
def an_empty_loader() -> Case:
    return Case(Net(), rows(0, 2))


@case
def an_empty_loader_among_others() -> Case:
    return Case(Net(), [rows(4, 2), rows(0, 2), rows(3, 2)])


@case
def a_stream_without_length() -> Case:
    return Case(Net(), DataLoader(Stream(7), 2))


@case
def a_stream_with_length() -> Case:
    return Case(Net(), DataLoader(SizedStream(7), 2))


@case
def streams_and_datasets() -> Case:
    return Case(Net(), [DataLoader(Stream(5), 2), rows(4, 2), DataLoader(Stream(1), 2)])


class CustomLoader:
    def __iter__(self) -> Iterator[Tensor]:
        return iter(Rows(8).rows.split(2))


class SizedLoader(CustomLoader):
    def __len__(self) -> int:
        return 4


@case
def a_custom_loader() -> Case:
    return Case(Net(), CustomLoader())


@case
def a_custom_loader_with_length() -> Case:
    return Case(Net(), SizedLoader())


@case
def a_list_of_tensors_is_many_loaders() -> Case:
    return Case(Net(), [Rows(2).rows, Rows(3).rows])


@case
def worker_processes() -> Case:
    return Case(Net(), DataLoader(Rows(9), 2, num_workers=2))


@case
def a_shuffled_loader() -> Case:
    generator = torch.Generator().manual_seed(3)
    return Case(Net(), DataLoader(Rows(9), 2, sampler=RandomSampler(range(9), generator=generator)))


@case
def a_batch_sampler() -> Case:
    return Case(Net(), DataLoader(Rows(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 4, drop_last=True)))


@case
def no_batching() -> Case:
    return Case(Net(), DataLoader(Rows(5), batch_size=None))


@case
def limited_to_a_number() -> Case:
    return Case(Net(), [rows(8, 2), rows(2, 2)], trainer={"limit_predict_batches": 2})


@case
def limited_to_a_fraction() -> Case:
    return Case(Net(), rows(12, 2), trainer={"limit_predict_batches": 0.5})


@case
def limited_to_nothing() -> Case:
    return Case(Net(), rows(12, 2), trainer={"limit_predict_batches": 0})


@case
def a_limited_stream() -> Case:
    return Case(Net(), DataLoader(Stream(9), 2), trainer={"limit_predict_batches": 3})


@case
def fast_dev_run() -> Case:
    return Case(Net(), rows(12, 2), trainer={"fast_dev_run": 2})


class OwnLoader(Net):
    def predict_dataloader(self) -> Any:
        return rows(6, 2)


@case
def the_modules_own_loader() -> Case:
    return Case(OwnLoader())


class Data(LightningDataModule):
    def predict_dataloader(self) -> Any:
        return [rows(6, 2), rows(3, 2)]


@case
def a_datamodule() -> Case:
    return Case(Net(), datamodule=Data())


# Steps and outputs


@case
def outputs_of_none() -> Case:
    return Case(Stepped(lambda m, x, i: None if i % 2 else m.net(x)), rows(10, 2))


@case
def outputs_of_strings_and_numbers() -> Case:
    return Case(Stepped(lambda m, x, i: [f"batch {i}", i, 1.5, True, b"x", {"set"}]), rows(8, 2))


@case
def nested_outputs() -> Case:
    return Case(Stepped(lambda m, x, i: {"a": [m.net(x), (x, i)], "b": {"c": m.net(x)[:, 0], "d": ()}}), rows(8, 2))


@case
def outputs_of_other_dtypes() -> Case:
    def step(m: Net, x: Tensor, i: int) -> Any:
        scores = m.net(x)
        return scores.argmax(1), scores > 0, scores.half(), scores.double(), scores.to(torch.int32), scores[:0]

    return Case(Stepped(step), rows(8, 2))


@dataclass
class Scores:
    scores: Tensor
    name: str


@case
def outputs_of_dataclasses() -> Case:
    return Case(Stepped(lambda m, x, i: Scores(m.net(x), f"batch {i}")), rows(8, 2))


class NamedScores(NamedTuple):
    scores: Tensor
    number: int


@case
def outputs_of_named_tuples() -> Case:
    return Case(Stepped(lambda m, x, i: NamedScores(m.net(x), i)), rows(8, 2))


@case
def outputs_of_model_outputs() -> Case:
    def step(m: Net, x: Tensor, i: int) -> Any:
        return BaseModelOutput(last_hidden_state=m.net(x), hidden_states=(x, x + 1))

    return Case(Stepped(step), rows(8, 2))


@case
def outputs_on_the_host_already() -> Case:
    return Case(Stepped(lambda m, x, i: m.net(x).cpu()), rows(8, 2))


@case
def outputs_that_are_the_input() -> Case:
    return Case(Stepped(lambda m, x, i: (x, x[:, 1:], x.t())), rows(8, 2))


@case
def outputs_that_are_weights() -> Case:
    return Case(Stepped(lambda m, x, i: (m.net(x), m.net[0].weight.detach(), m.net[0].bias)), rows(8, 2))


@case
def outputs_that_depend_on_the_index() -> Case:
    return Case(Stepped(lambda m, x, i: m.net(x) * i), rows(12, 2))


@case
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


@case
def a_buffer_that_counts() -> Case:
    return Case(Counting(), rows(12, 2))


class WithMetric(Net):
    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        scores = self.net(batch)
        return scores, self.metric(scores)


@case
def a_metric_in_the_step() -> Case:
    return Case(WithMetric(), rows(12, 2))


class Dropping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))


@case
def training_mode_is_left_and_restored() -> Case:
    return Case(Dropping(), rows(12, 2))


@case
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


@case
def a_step_without_batch_idx() -> Case:
    return Case(OnlyBatch(), rows(8, 2))


class AnyArguments(OnlyBatch):
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(args[0]), args[1:]


@case
def a_step_of_any_arguments() -> Case:
    return Case(AnyArguments(), [rows(8, 2), rows(4, 2)])


class NoLoaderIndex(OnlyBatch):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return self.net(batch)


@case
def a_step_without_loader_index_for_several_loaders_is_refused() -> Case:
    return Case(NoLoaderIndex(), [rows(8, 2), rows(4, 2)])


class DefaultStep(Net):
    """Lightning's own `predict_step` calls the module."""

    predict_step = LightningModule.predict_step

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


@case
def the_default_step() -> Case:
    return Case(DefaultStep(), rows(8, 2))


class PullsBatches(OnlyBatch):
    def predict_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.net(batch.to(self.device))


class LogsInStep(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("x", 1.0)


@case
def logging_in_the_step_is_refused() -> Case:
    return Case(LogsInStep(), rows(8, 2))


@case
def a_step_that_stops_the_run() -> Case:
    def step(m: Net, x: Tensor, i: int) -> Any:
        if i == 3:
            raise StopIteration
        return m.net(x)

    return Case(Stepped(step), rows(12, 2))


# Batches


@case
def batches_with_strings_and_ids() -> Case:
    loader = items(lambda x, i: {"x": x, "id": f"row {i}", "number": i})
    return Case(Stepped(lambda m, b, i: (m.net(b["x"]), b["id"], b["number"])), loader)


@case
def batches_of_tuples() -> Case:
    return Case(Stepped(lambda m, b, i: m.net(b[0]) + b[1][:, None]), items(lambda x, i: (x, i)))


@case
def batches_of_named_tuples() -> Case:
    return Case(Stepped(lambda m, b, i: (m.net(b.scores), b.number)), items(NamedScores))


def encode(rows: list[Tensor]) -> BatchEncoding:
    return BatchEncoding({"x": torch.stack(rows), "mask": torch.ones(len(rows), dtype=torch.int64)})


@case
def batches_of_batch_encodings() -> Case:
    loader = items(lambda x, i: x, collate_fn=encode)
    return Case(Stepped(lambda m, b, i: m.net(b["x"]) * b["mask"][:, None]), loader)


@dataclass
class Record:
    x: Tensor
    names: list[str]


def collect(rows: list[tuple[Tensor, int]]) -> Record:
    return Record(torch.stack([x for x, _ in rows]), [f"row {i}" for _, i in rows])


@case
def batches_of_dataclasses() -> Case:
    loader = items(lambda x, i: (x, i), collate_fn=collect)
    return Case(Stepped(lambda m, b, i: (m.net(b.x), b.names)), loader)


class Bag:
    """A batch object of the user's own, as those of graph libraries are."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.moves = 0

    def to(self, device: Any) -> "Bag":
        moved = Bag(self.x.to(device))
        moved.moves = self.moves + 1
        return moved


@case
def batches_of_own_objects() -> Case:
    loader = items(lambda x, i: x, collate_fn=lambda rows: Bag(torch.stack(rows)))
    return Case(Stepped(lambda m, b, i: (m.net(b.x), b.moves)), loader)


@case
def lists_without_tensors() -> Case:
    loader = items(lambda x, i: i, collate_fn=list)
    return Case(Stepped(lambda m, b, i: [number * 2 for number in b]), loader)


# Transfer hooks


class Transfers(Net):
    """Overrides every transfer hook and notes the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def _see(self, name: str) -> None:
        self.seen[name] = self.seen.get(name, 0) + 1

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self._see(f"before {dataloader_idx}")
        return batch + 1

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self._see(f"transfer {dataloader_idx}")
        return super().transfer_batch_to_device(batch * 2, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self._see(f"after {dataloader_idx}")
        return batch - 3


@case
def transfer_hooks_of_the_module() -> Case:
    return Case(Transfers(), [rows(6, 2), rows(4, 2)])


class TransferringData(Data):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch + 5

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch / 2


@case
def transfer_hooks_of_the_datamodule() -> Case:
    return Case(Net(), datamodule=TransferringData())


@case
def transfer_hooks_of_both() -> Case:
    return Case(Transfers(), datamodule=TransferringData())


# Callbacks and hooks


class HookedModule(Net):
    """The module's own batch hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {"starts": [], "ends": []}

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["starts"].append(batch_idx)

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["ends"].append(batch_idx + int(outputs.shape[0]) * 100)


@case
def hooks_of_the_module() -> Case:
    return Case(HookedModule(), rows(9, 2))


class Doubles(Callback):
    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any) -> None:
        outputs["scores"].mul_(2)
        outputs["added"] = 1
        outputs.pop("dropped")


@case
def a_callback_that_changes_outputs() -> Case:
    module = Stepped(lambda m, x, i: {"scores": m.net(x), "dropped": x})
    return Case(module, rows(8, 2), callbacks=[Doubles()])


class ChangesBatches(Callback):
    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *_: Any, **__: Any) -> None:
        batch["x"] = batch["x"] + 1


@case
def a_callback_that_changes_batches() -> Case:
    module = Stepped(lambda m, b, i: m.net(b["x"]))
    return Case(module, items(lambda x, i: {"x": x}), callbacks=[ChangesBatches()])


# Trainer


@case
def predictions_not_returned() -> Case:
    return Case(Net(), rows(9, 2), predict={"return_predictions": False})


@case
def without_inference_mode() -> Case:
    return Case(Net(), rows(9, 2), trainer={"inference_mode": False})


@case
def bf16_true() -> Case:
    return Case(Net(), rows(9, 2), trainer={"precision": "bf16-true"})


@case
def double_precision() -> Case:
    return Case(Net(), rows(9, 2), trainer={"precision": "64-true"})


@case
def a_profiler() -> Case:
    return Case(Net(), rows(9, 2), trainer={"profiler": "simple"})


@case
def a_pytorch_profiler() -> Case:
    profiler = PyTorchProfiler(dirpath=tempfile.gettempdir(), filename="profile", export_to_chrome=False)
    return Case(Net(), rows(9, 2), trainer={"profiler": profiler})


def predict_first(trainer: Trainer, case: Case) -> None:
    trainer.predict(case.module, case.loaders)


@case
def predicting_twice() -> Case:
    return Case(Net(), rows(9, 2), before=predict_first)


def checkpoint_first(trainer: Trainer, case: Case) -> None:
    folder = Path(tempfile.mkdtemp())
    trainer.predict(case.module, case.loaders)
    trainer.save_checkpoint(folder / "a.ckpt")
    with torch.no_grad():
        for parameter in case.module.parameters():
            parameter.zero_()
    case.predict["ckpt_path"] = folder / "a.ckpt"


@case
def from_a_checkpoint() -> Case:
    return Case(Net(), rows(9, 2), before=checkpoint_first)


class FindsBatchSize(Net):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def predict_dataloader(self) -> Any:
        return rows(40, self.batch_size)


@case
def a_batch_size_finder() -> Case:
    return Case(FindsBatchSize(), callbacks=[BatchSizeFinder(steps_per_trial=2, max_trials=3)])


# Faults


def failing(where: str) -> Callable[..., Any]:
    def step(m: Net, x: Tensor, i: int) -> Any:
        if i == 3:
            raise ValueError(where)
        return m.net(x)

    return step


@case
def a_fault_in_the_step() -> Case:
    return Case(Stepped(failing("step")), rows(12, 2))


def bad_row(x: Tensor, i: int) -> Tensor:
    if i == 7:
        raise ValueError("row 7")
    return x


@case
def a_fault_in_the_dataset() -> Case:
    return Case(Net(), items(bad_row, 12))


def bad_collate(rows: list[Tensor]) -> Tensor:
    if float(rows[0][0]) > 4:
        raise ValueError("collate")
    return torch.stack(rows)


@case
def a_fault_in_collate() -> Case:
    return Case(Net(), items(lambda x, i: x, 12, collate_fn=bad_collate))


@case
def a_fault_in_a_worker_process() -> Case:
    return Case(Net(), items(bad_row, 12, num_workers=1))


def terminate(m: Net, x: Tensor, i: int) -> Tensor:
    if i == 2:
        signal.raise_signal(signal.SIGTERM)
    return m.net(x)


@case
def sigterm_in_the_middle() -> Case:
    return Case(Stepped(terminate), rows(12, 2))


@case
def a_fault_in_a_transfer_hook() -> Case:
    module = Transfers()
    module.on_after_batch_transfer = lambda batch, dataloader_idx: bad_row(batch, int(batch[0, 0]))  # type: ignore
    return Case(module, rows(16, 2))


class BadCallback(Callback):
    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *args: Any) -> None:
        if batch_idx == 3:
            raise ValueError("start")


@case
def a_fault_in_a_start_hook() -> Case:
    return Case(Net(), rows(12, 2), callbacks=[BadCallback()])
