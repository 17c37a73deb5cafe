"""Whatever batches may come from: loaders, samplers, streams, limits."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from tests.helpers import Net, Rows, rows
from tests.parity.cases.registry import Data, case
from tests.parity.recorder import Case


class Stream(IterableDataset[Tensor]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Tensor]:
        return iter(Rows(self.length).rows)


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.length


@case(captures=1, replays=3)
def plain() -> Case:
    return Case(Net(), rows(10, 2))


@case(captures=1, replays=1)
def uneven_last_batch() -> Case:
    return Case(Net(), rows(11, 3))


@case(captures=0, replays=0)
def one_batch() -> Case:
    return Case(Net(), rows(2, 2))


@case(captures=1, replays=0)
def two_batches() -> Case:
    return Case(Net(), rows(4, 2))


@case(captures=1, replays=2)
def several_loaders() -> Case:
    return Case(Net(), [rows(6, 2), rows(5, 3), rows(1, 1)])


@case(captures=1, replays=3)
def a_tuple_of_loaders() -> Case:
    return Case(Net(), (rows(6, 2), rows(4, 2)))


@case(captures=2, replays=3)
def a_dict_of_loaders() -> Case:
    return Case(Net(), {"a": rows(6, 2), "b": rows(4, 1)})


@case(captures=1, replays=3)
def combined_loader() -> Case:
    return Case(Net(), CombinedLoader([rows(6, 2), rows(5, 2)], "sequential"))


@case(captures=0, replays=0)
def combined_loader_in_another_mode_is_refused() -> Case:
    return Case(Net(), CombinedLoader([rows(6, 2), rows(5, 2)], "max_size"))


@case(captures=0, replays=0)
def an_empty_loader() -> Case:
    return Case(Net(), rows(0, 2))


@case(captures=1, replays=1)
def an_empty_loader_among_others() -> Case:
    return Case(Net(), [rows(4, 2), rows(0, 2), rows(3, 2)])


@case(captures=1, replays=1)
def a_stream_without_length() -> Case:
    return Case(Net(), DataLoader(Stream(7), 2))


@case(captures=1, replays=1)
def a_stream_with_length() -> Case:
    return Case(Net(), DataLoader(SizedStream(7), 2))


@case(captures=2, replays=2)
def streams_and_datasets() -> Case:
    return Case(Net(), [DataLoader(Stream(5), 2), rows(4, 2), DataLoader(Stream(1), 2)])


class CustomLoader:
    def __iter__(self) -> Iterator[Tensor]:
        return iter(Rows(8).rows.split(2))


class SizedLoader(CustomLoader):
    def __len__(self) -> int:
        return 4


@case(captures=1, replays=2)
def a_custom_loader() -> Case:
    return Case(Net(), CustomLoader())


@case(captures=1, replays=2)
def a_custom_loader_with_length() -> Case:
    return Case(Net(), SizedLoader())


@case(captures=1, replays=3)
def a_list_of_tensors_is_many_loaders() -> Case:
    return Case(Net(), [Rows(2).rows, Rows(3).rows])


@case(captures=1, replays=2)
def worker_processes() -> Case:
    return Case(Net(), DataLoader(Rows(9), 2, num_workers=2))


@case(captures=1, replays=2)
def a_shuffled_loader() -> Case:
    generator = torch.Generator().manual_seed(3)
    return Case(Net(), DataLoader(Rows(9), 2, sampler=RandomSampler(range(9), generator=generator)))


@case(captures=1, replays=0)
def a_batch_sampler() -> Case:
    return Case(Net(), DataLoader(Rows(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 4, drop_last=True)))


@case(captures=1, replays=3)
def no_batching() -> Case:
    return Case(Net(), DataLoader(Rows(5), batch_size=None))


@case(captures=1, replays=1)
def limited_to_a_number() -> Case:
    return Case(Net(), [rows(8, 2), rows(2, 2)], trainer={"limit_predict_batches": 2})


@case(captures=1, replays=1)
def limited_to_a_fraction() -> Case:
    return Case(Net(), rows(12, 2), trainer={"limit_predict_batches": 0.5})


@case(captures=0, replays=0)
def limited_to_nothing() -> Case:
    return Case(Net(), rows(12, 2), trainer={"limit_predict_batches": 0})


@case(captures=1, replays=1)
def a_limited_stream() -> Case:
    return Case(Net(), DataLoader(Stream(9), 2), trainer={"limit_predict_batches": 3})


@case(captures=1, replays=0)
def fast_dev_run() -> Case:
    return Case(Net(), rows(12, 2), trainer={"fast_dev_run": 2})


class OwnLoader(Net):
    def predict_dataloader(self) -> Any:
        return rows(6, 2)


@case(captures=1, replays=1)
def the_modules_own_loader() -> Case:
    return Case(OwnLoader())


@case(captures=1, replays=2)
def a_datamodule() -> Case:
    return Case(Net(), datamodule=Data())
