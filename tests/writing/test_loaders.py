"""Dataloaders that yield other batches than their sampler: each sample once, as in stock Lightning, or an error."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset, Sampler, SubsetRandomSampler

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter
from lightning_hpu_infer.writing.describe import describe
from lightning_hpu_infer.writing.read import read_predictions
from tests.helpers import trainer
from tests.writing.predicting import COUNT, Numbers, Scores, Stream, expected, predict, stop, written


class Filters(DataLoader[Any]):
    """Every other batch."""

    def __iter__(self) -> Any:
        return (batch for number, batch in enumerate(super().__iter__()) if number % 2 == 0)


class Reverses(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


class Wraps(DataLoader[Any]):
    """As PyTorch Geometric's NodeLoader does."""

    def _get_iterator(self) -> Any:
        return iter(list(super()._get_iterator())[1:])


OWN = [Filters, Reverses, Wraps]


def rows_of(found: Any) -> list[float]:
    return [row for batch in found for row in batch["row"].tolist()]


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("kind", OWN)
def test_batches_of_a_loaders_own_are_numbered_as_they_come(tmp_path: Path, kind: Any, pipelining: bool) -> None:
    """Without the indices of the sampler, of whose batches they may be others."""
    stock = rows_of(trainer("cpu").predict(Scores(), kind(Numbers(), 4)))
    words = rf"Dataloader 0, of class {kind.__name__}, has `(__iter__|_get_iterator)` of its own.*in which they come"
    with pytest.warns(UserWarning, match=words):
        stop(tmp_path, kind(Numbers(), 4), 2, pipelining=pipelining)
    assert read_predictions(tmp_path)["row"].to_pylist() == stock[: len(written(tmp_path))]
    for left in (True, False):
        with pytest.warns(UserWarning, match=words):
            module = Scores()
            predict(tmp_path, module, kind(Numbers(), 4), pipelining=pipelining)
        assert [row for _, _, row, _ in written(tmp_path)] == stock
        assert [index for _, index, *_ in written(tmp_path)] == list(range(len(stock)))
        assert bool(module.seen) == left
    assert describe(tmp_path).sound


@pytest.mark.filterwarnings("ignore:Dataloader 0, of class Filters")
def test_such_batches_of_another_size_are_refused(tmp_path: Path) -> None:
    stop(tmp_path, Filters(Numbers(), 4), 2)
    with pytest.raises(ValueError, match="devices, batch size and workers of streams"):
        predict(tmp_path, Scores(), Filters(Numbers(), 5))


@pytest.mark.filterwarnings("ignore:Dataloader 0, of class Filters", "ignore:Couldn't infer the batch indices")
@pytest.mark.filterwarnings("ignore:Your `predict_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize("accelerator", ["cpu", "hpu"])
@pytest.mark.parametrize("kind", [Filters, DataLoader])
@pytest.mark.parametrize("options", [{"shuffle": True}, {"sampler": SubsetRandomSampler(range(COUNT))}], ids=" ".join)
def test_shuffled_samples_without_indices_are_not_gone_on_with(
    tmp_path: Path, kind: Any, options: dict[str, Any], accelerator: str
) -> None:
    size = None if kind is DataLoader else 4

    class Rows(Scores):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return batch["row"].reshape(-1, 4)[:, 0]

    def run(module: Any) -> None:
        on: Any = accelerator if accelerator == "cpu" else HPUInferenceAccelerator()
        trainer(on, [PredictionWriter(tmp_path)]).predict(module, kind(Numbers(), size, **options))

    with pytest.raises(RuntimeError, match="killed"):
        run(Rows(2))
    with pytest.raises(MisconfigurationException, match=r"Dataloader 0 is shuffled, and .* is not known"):
        run(Rows())


@pytest.mark.parametrize("accelerator", ["cpu", "hpu"])
@pytest.mark.parametrize("data", [Numbers(), Stream()], ids=["samples", "stream"])
def test_workers_that_hand_over_what_is_ready_first_are_refused(tmp_path: Path, data: Any, accelerator: str) -> None:
    on: Any = accelerator if accelerator == "cpu" else HPUInferenceAccelerator()
    loader = DataLoader(data, 4, num_workers=2)
    loader.in_order = False  # an argument since torch 2.6
    with pytest.raises(MisconfigurationException, match=r"Dataloader 0 has `in_order=False`.*Leave `in_order` out"):
        trainer(on, [PredictionWriter(tmp_path)]).predict(Scores(), loader)
    assert not list(tmp_path.iterdir())


def test_without_workers_they_come_in_order(tmp_path: Path) -> None:
    loader = DataLoader(Numbers(), 4)
    loader.in_order = False
    stop(tmp_path, loader, 2)
    predict(tmp_path, Scores(), loader)
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


# Samplers


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("accelerator", ["cpu", "hpu"])
@pytest.mark.parametrize(
    "places", [[3, 1, 3, 0, 1, 2, 3, 3], [0, 1, 1, 1], [1, 2, 0, 0]], ids=["over batches", "in a batch", "new ones"]
)
def test_samples_that_come_several_times_are_never_dropped(
    tmp_path: Path, places: list[int], accelerator: str, writers: int
) -> None:
    """Whoever goes on: what is read are the rows of stock Lightning, or those of the first run and an error."""

    def run(module: Scores) -> None:
        on: Any = accelerator if accelerator == "cpu" else HPUInferenceAccelerator()
        callbacks = [PredictionWriter(tmp_path / str(number)) for number in range(writers)]
        trainer(on, callbacks).predict(module, DataLoader(Numbers(), 2, sampler=places))

    with pytest.raises(RuntimeError, match="killed"):
        run(Scores(1))
    before = [index for _, index, *_ in written(tmp_path / "0")]
    assert before == sorted(places[:2])
    skips = accelerator == "hpu" and writers == 1
    if skips or not set(places[2:]).isdisjoint(before):
        with pytest.raises(MisconfigurationException, match="yields samples several times"):
            run(Scores())
    else:
        run(Scores())
        assert sorted(index for _, index, *_ in written(tmp_path / "0")) == sorted(places)
    for number in range(writers):
        found = [index for _, index, *_ in written(tmp_path / str(number))]
        assert all(found.count(index) == 1 for index in before)


class Endless(Sampler[int]):
    """Fails if it is asked for much more than a run of some batches needs."""

    def __iter__(self) -> Iterator[int]:
        for place in count():
            assert place < 40, "asked for all of an endless sampler"
            yield place % COUNT


def test_an_endless_sampler_goes_on_up_to_the_limit(tmp_path: Path) -> None:
    loader = DataLoader(Numbers(), 4, sampler=Endless())
    for module in (Scores(2), Scores()):
        ours = trainer(HPUInferenceAccelerator(), [PredictionWriter(tmp_path)], limit_predict_batches=4)
        if module.fails_at:
            with pytest.raises(RuntimeError, match="killed"):
                ours.predict(module, loader)
        else:
            ours.predict(module, loader)
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))[:16]
    assert module.seen == [2, 3]


# What a fingerprint has of them


class Endlessly(Dataset[dict[str, Any]]):
    """Without a length, as a sampler of the user's needs none."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return Numbers(100)[i]


class Ready:
    """A dataloader of the user's own."""

    def __init__(self, batch_size: Any) -> None:
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        return ({"row": torch.full((2, 4), float(number))} for number in range(3))


def counted(self: Any) -> int:
    return 2


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")
@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Endlessly(), 2, sampler=[4, 7, 1, 30]),
        *(Ready(size) for size in (2, np.int64(2), torch.tensor(2), counted, "2", 2.0)),
        type("Sized", (Ready,), {"num_workers": counted})(2),
    ],
    ids=["no length", "int", "np.int64", "tensor", "function", "string", "float", "workers"],
)
def test_whatever_stock_lightning_takes_is_written_and_gone_on_with(tmp_path: Path, loader: Any) -> None:
    stock = rows_of(trainer("cpu").predict(Scores(), loader))
    stop(tmp_path, loader, 1)
    predict(tmp_path, Scores(), loader)
    assert sorted(row for _, _, row, _ in written(tmp_path)) == sorted(stock)
    assert describe(tmp_path).sound
