"""Datasets without indices: each sample of a stream once, with stock Lightning's value, whatever hooks make of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter
from lightning_hpu_infer.writing.describe import describe
from lightning_hpu_infer.writing.manifest import File, Manifest
from lightning_hpu_infer.writing.read import read_predictions
from tests.helpers import trainer
from tests.writing.predicting import COUNT, Numbers, Scores, Stream, expected, predict, stop, written

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")  # Lightning's, for all writers


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_stream_goes_on_where_it_stopped(tmp_path: Path, after: int) -> None:
    stop(tmp_path, DataLoader(Stream(), 4), after)
    module = Scores()
    predict(tmp_path, module, DataLoader(Stream(), 4))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))
    assert module.seen == list(range(after, 6))


def test_a_stream_in_other_batches_is_refused(tmp_path: Path) -> None:
    stop(tmp_path, DataLoader(Stream(), 4), 2)
    with pytest.raises(ValueError, match="devices, batch size and workers of streams"):
        predict(tmp_path, Scores(), DataLoader(Stream(), 5))


@dataclass
class Words(IterableDataset[Any]):
    """Each sample is made of its number by a function."""

    sample: Callable[[int], Any]
    count: int = 11

    def __iter__(self) -> Iterator[Any]:
        return map(self.sample, range(self.count))


class Values(LightningModule):
    """Ends a run by an error in one of its batches."""

    fails_at: int | None = None

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.fails_at:
            raise RuntimeError("killed")
        return batch.get("x", batch) if isinstance(batch, dict) else batch


class Tokenized(Values):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        _, texts = batch
        return {"x": torch.tensor([float(text.split()[1]) for text in texts])}


class Tiled(Values):
    """Each sample becomes several."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch.repeat_interleave(4, 0)


class Sifted(Values):
    """Some samples are dropped: of some batches, all."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[batch % 5 > 2]


class Joined(Values):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        left, right = super().predict_step(batch, batch_idx)
        return [a + b for a, b in zip(left, right, strict=True)]


class Chosen(Values):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return super().predict_step(batch, batch_idx)["text"]


class Single(Values):
    """One sample at a time, which is a tensor of another length."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return super().predict_step(batch, batch_idx).sum()[None]


@dataclass
class Kind:
    module: type[Values]
    sample: Callable[[int], Any]
    size: int | None = 3
    options: dict[str, Any] = field(default_factory=dict)


KINDS = {
    "texts that a hook tokenizes": Kind(Tokenized, lambda i: (f"id{i}", f"text {i}")),
    "a hook repeats": Kind(Tiled, float),
    "a hook drops": Kind(Sifted, float, 2),
    "pairs of strings": Kind(Joined, lambda i: (f"a{i}", f"b{i}")),
    "a nested field comes first": Kind(Chosen, lambda i: {"meta": {"key": f"a{i}"}, "text": f"b{i}"}),
    "no batches": Kind(Single, lambda i: torch.full((4,), float(i)), None),
    "no batches, of strings": Kind(Joined, lambda i: ([f"a{i}"], [f"b{i}"]), None),
    "workers": Kind(Tiled, float, 3, {"num_workers": 1}),
}


@pytest.mark.parametrize("after", [2, *(pytest.param(after, marks=pytest.mark.full) for after in (0, 1, 3))])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_row_is_written_once_whatever_a_batch_becomes(tmp_path: Path, kind: Kind, after: int) -> None:
    def run(accelerator: Any, callbacks: list[Any], fails_at: int | None = None) -> list[Any]:
        module = kind.module()
        module.fails_at = fails_at
        loader = DataLoader(Words(kind.sample), kind.size, **kind.options)
        found: Any = trainer(accelerator, callbacks).predict(module, loader)
        return [value for batch in found for value in (batch.tolist() if isinstance(batch, Tensor) else batch)]

    stock = run("cpu", [])
    with pytest.raises(RuntimeError, match="killed"):
        run(HPUInferenceAccelerator(), [PredictionWriter(tmp_path)], fails_at=after)
    run(HPUInferenceAccelerator(), [PredictionWriter(tmp_path)])
    table = read_predictions(tmp_path)
    assert table["prediction"].to_pylist() == stock
    assert table["index"].to_pylist() == list(range(len(stock)))
    assert describe(tmp_path).sound


def test_rows_that_do_not_fit_to_the_batch_are_an_error(tmp_path: Path) -> None:
    class Mean(Values):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return batch.mean(0)

    loader = DataLoader(Words(lambda i: torch.full((4,), float(i))), 3)
    with pytest.raises(ValueError, match=r"has shape \[4\], and the batch has 3 samples"):
        trainer(HPUInferenceAccelerator(), [PredictionWriter(tmp_path)]).predict(Mean(), loader)


def test_what_nobody_can_count_is_an_error(tmp_path: Path) -> None:
    class Nothing(Values):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return "a text"

    loader = DataLoader(Words(str), None)
    message = r"batch 0 of dataloader 0: .* cannot tell how many .* prediction \(str\) .*batch \(str\).*one value per"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(HPUInferenceAccelerator(), [PredictionWriter(tmp_path)]).predict(Nothing(), loader)


@pytest.mark.filterwarnings("ignore:.*Its 8 samples are predicted again")
@pytest.mark.parametrize("lost", range(3))
@pytest.mark.parametrize("cut", [False, True])
def test_a_lost_file_of_a_stream_is_predicted_again(tmp_path: Path, lost: int, cut: bool) -> None:
    predict(tmp_path, Scores(), DataLoader(Stream(), 4), writer=PredictionWriter(tmp_path, rows_per_file=8))
    files = sorted(tmp_path.glob("rank-00000/*.parquet"))
    assert len(files) == 3
    if cut:
        files[lost].write_bytes(files[lost].read_bytes()[:-1])
    else:
        files[lost].unlink()
    module = Scores()
    with pytest.warns(UserWarning, match="predicted again"):
        predict(tmp_path, module, DataLoader(Stream(), 4))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))
    assert module.seen == list(range(2 * lost, 6))
    module = Scores()
    predict(tmp_path, module, DataLoader(Stream(), 4))
    assert module.seen == []


def test_several_streams_beside_a_dataset(tmp_path: Path) -> None:
    def loaders() -> list[Any]:
        return [DataLoader(Stream(7), 2), DataLoader(Numbers(6), 2), DataLoader(Stream(5), 2)]

    for after in range(10):
        stop(tmp_path / str(after), loaders(), after)
        predict(tmp_path / str(after), Scores(), loaders())
        assert written(tmp_path / str(after)) == expected([DataLoader(Numbers(n), 2) for n in (7, 6, 5)])


def test_without_our_loop_a_stream_is_predicted_again_and_written_once(tmp_path: Path) -> None:
    stop(tmp_path, DataLoader(Stream(), 4), 3)
    trainer("cpu", [PredictionWriter(tmp_path)]).predict(Scores(), DataLoader(Stream(), 4))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))
    module = Scores()
    predict(tmp_path, module, DataLoader(Stream(), 4))
    assert module.seen == []


@pytest.mark.parametrize(
    ("files", "start"),
    [
        ([], (0, 0)),
        ([[[0, 6, 2]], [[6, 9, 3]]], (9, 3)),
        ([[[6, 9, 3]], [[0, 6, 2]]], (9, 3)),
        ([[[0, 6, 2]], [[9, 12, 4]]], (6, 2)),
        ([[[0, 6, 2], [9, 12, 7]], [[6, 9, 5]]], (12, 7)),  # batches without rows between them
        ([[[3, 6, 2]]], (0, 0)),
    ],
)
def test_where_a_stream_goes_on(files: list[list[list[int]]], start: tuple[int, int]) -> None:
    listed = [File(name="", rows=0, bytes=0, sha256="", indices=None, streams={1: stretches}) for stretches in files]
    manifest = Manifest(rank=0, world=1, fingerprint={}, files=listed)
    assert manifest.start_of(1) == start
    assert manifest.start_of(0) == (0, 0)


def test_the_streams_of_a_run_before_they_were_noted_begin_anew(tmp_path: Path) -> None:
    predict(tmp_path, Scores(), DataLoader(Stream(), 4))
    path = tmp_path / "rank-00000" / "_manifest.json"
    text = path.read_text()
    path.write_text(text.replace(f'"streams": {{"0": [[0, {COUNT}, 6]]}}', '"streams": {}').replace("\n", ""))
    assert path.read_text() != text
    module = Scores()
    predict(tmp_path, module, DataLoader(Stream(), 4))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))
