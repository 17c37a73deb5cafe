"""`PredictionWriter` in runs of a Trainer: each sample once, with stock Lightning's value, however runs are ended."""

import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BasePredictionWriter, TQDMProgressBar
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter
from lightning_hpu_infer.observe import chrome
from lightning_hpu_infer.observer import Lane
from lightning_hpu_infer.writing import session
from lightning_hpu_infer.writing.background import Background
from lightning_hpu_infer.writing.read import read_predictions
from tests.helpers import trainer
from tests.writing.predicting import COUNT, Numbers, Scores, expected, predict, stop, written

FLAGS: list[dict[str, Any]] = [
    {},
    {"pipelining": False},
    {"group_by_length": "name"},
    {"in_flight": 4, "prefetch": 3},
    {"async_output": False, "defer_hooks": False},
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_each_sample_is_written_once_with_stocks_value(tmp_path: Path, flags: dict[str, Any]) -> None:
    loaders = [DataLoader(Numbers(), 4), DataLoader(Numbers(9), 5)]
    predict(tmp_path, Scores(), loaders, **flags)
    assert written(tmp_path) == expected(loaders)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("after", [0, 1, 3, 5])
@pytest.mark.parametrize(
    ("size", "flags"), [(4, {}), (7, {}), (3, {"group_by_length": "name"}), (5, {"pipelining": False})], ids=str
)
def test_a_run_goes_on_where_one_stopped(tmp_path: Path, after: int, size: int, flags: dict[str, Any]) -> None:
    stop(tmp_path, DataLoader(Numbers(), 4), after)
    done = [index for _, index, _, _ in written(tmp_path)] if after else []
    assert done == list(range(4 * after))  # what was predicted before the error is kept
    numbers, module = Numbers(), Scores()
    predictions = predict(tmp_path, module, DataLoader(numbers, size), **flags)
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))
    assert set(numbers.loaded) == set(range(4 * after, COUNT))  # those that are done are not even loaded
    assert sum(len(batch["row"]) for batch in predictions) == COUNT - 4 * after
    batches = -(-COUNT // size)
    assert module.seen == list(range(batches - len(module.seen), batches))


def test_when_all_is_written_nothing_is_predicted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    predict(tmp_path, Scores(), DataLoader(Numbers(), 4))
    module, numbers = Scores(), Numbers()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        assert predict(tmp_path, module, DataLoader(numbers, 4)) == []
    assert (module.seen, numbers.loaded) == ([], [])
    assert f"{tmp_path} has predictions of {COUNT} samples from an earlier run. They are left out." in caplog.messages
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


def test_the_progress_bar_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Bar(TQDMProgressBar):
        def __init__(self) -> None:
            super().__init__()
            self.shown: list[tuple[int, Any]] = []

        def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_predict_batch_end(*args, **kwargs)
            self.shown.append((self.predict_progress_bar.n, self.predict_progress_bar.total))

    stop(tmp_path, DataLoader(Numbers(), 4), 4)
    bar = Bar()
    ours = trainer(HPUInferenceAccelerator(), [PredictionWriter(tmp_path), bar], enable_progress_bar=True)
    ours.predict(Scores(), DataLoader(Numbers(), 4))
    assert bar.shown == [(5, 6), (6, 6)]


@pytest.mark.parametrize("limit", [3, 0.5])
def test_a_limit_counts_from_the_beginning_of_the_dataset(tmp_path: Path, limit: float) -> None:
    for _ in range(2):
        ours = trainer(HPUInferenceAccelerator(), [PredictionWriter(tmp_path)], limit_predict_batches=limit)
        ours.predict(Scores(), DataLoader(Numbers(), 4))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))[:12]


def test_a_users_batches_stay_together(tmp_path: Path) -> None:
    """Those of a batch sampler of the user's own, without the samples that are done."""

    class Pairs(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[i, COUNT - 1 - i] for i in range(COUNT // 2)])

        def __len__(self) -> int:
            return COUNT // 2

    def loader() -> DataLoader[Any]:
        return DataLoader(Numbers(), batch_sampler=Pairs(SequentialSampler(range(COUNT)), 2, False))

    stop(tmp_path, loader(), 4)
    module = Scores()
    predict(tmp_path, module, loader())
    by_index = {index: (row, scores) for _, index, row, scores in expected(DataLoader(Numbers(), 4))}
    middle = COUNT // 2
    assert written(tmp_path) == [(0, i, *by_index[i]) for i in range(COUNT) if i != middle]
    assert module.seen == list(range(4, middle))


def test_samples_that_come_several_times_cannot_be_left_out(tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Numbers(), 4, sampler=WeightedRandomSampler([1.0] * COUNT, 2 * COUNT))

    stop(tmp_path, loader(), 2)
    with pytest.raises(MisconfigurationException, match="yields samples several times"):
        predict(tmp_path, Scores(), loader())


class Named(Dataset[dict[str, Any]]):
    """Samples that are looked up by whatever has a place in the name."""

    def __init__(self, names: list[Any]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: Any) -> dict[str, Any]:
        return Numbers()[self.names.index(name)]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a", "b", "c"], "'a'"),
        ([(0, 1), (0, 2), (1, 0)], r"\(0, 1\)"),
        ([0.0, 0.5, 1.0], "0.0"),
        ([2**70] * 3, "1180"),
    ],
    ids=["strings", "tuples", "fractions", "large"],
)
def test_samples_without_a_position_are_refused(tmp_path: Path, names: list[Any], shown: str) -> None:
    loader = DataLoader(Named(names), 2, sampler=names)
    trainer("cpu").predict(Scores(), loader)
    words = rf"batch 0 of dataloader 0: its sampler yields {shown}.*`PredictionWriter`.* yield integers"
    with pytest.raises(MisconfigurationException, match=words):
        predict(tmp_path, Scores(), loader)
    stop(tmp_path / "some", DataLoader(Numbers(3), 1), 1)
    with pytest.raises(MisconfigurationException, match=f"Dataloader 0: its sampler yields {shown}"):
        predict(tmp_path / "some", Scores(), loader)


def test_positions_may_be_tensors(tmp_path: Path) -> None:
    def loader(*places: int) -> DataLoader[Any]:
        return DataLoader(Numbers(), 4, sampler=torch.tensor(places))

    stop(tmp_path, loader(*reversed(range(COUNT))), 2)
    predict(tmp_path, Scores(), loader(*range(COUNT)))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))
    with pytest.raises(MisconfigurationException, match="3 samples, 2 different ones"):
        predict(tmp_path, Scores(), loader(1, 2, 1))


# Beside others


@pytest.mark.parametrize("pipelining", [True, False])
def test_with_another_accelerator_nothing_is_written_twice(
    tmp_path: Path, pipelining: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stop(tmp_path, DataLoader(Numbers(), 4), 3, pipelining=pipelining)
    module = Scores()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer("cpu", [PredictionWriter(tmp_path)]).predict(module, DataLoader(Numbers(), 4))
    assert len(module.seen) == 6
    assert any("predicted, but not written, again" in message for message in caplog.messages)
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


def test_two_writers_have_every_sample_each(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    stop(one, DataLoader(Numbers(), 4), 3)
    ours = trainer(HPUInferenceAccelerator(), [PredictionWriter(one), PredictionWriter(two)])
    ours.predict(Scores(), DataLoader(Numbers(), 4))
    assert written(one) == written(two) == expected(DataLoader(Numbers(), 4))


def test_ids_of_the_batch_become_a_column(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path, id_key="name", columns={"scores": "logits"})
    predict(tmp_path, Scores(), DataLoader(Numbers(), 4), writer=writer)
    table = read_predictions(tmp_path)
    assert table.column_names == ["index", "dataloader_idx", "id", "logits"]
    assert table["id"].to_pylist() == [f"sample {i}" for i in range(COUNT)]
    with pytest.raises(ValueError, match="`id_key` is 'key', which the batch does not have: 'row', 'name'"):
        predict(tmp_path, Scores(), DataLoader(Numbers(), 4), writer=PredictionWriter(tmp_path / "x", id_key="key"))


@dataclass
class Sized:
    index: Any
    row: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "key", "found"),
    [
        ({"index": [1, 2]}, "index", [1, 2]),
        (Sized([1, 2], torch.ones(2)), "index", [1, 2]),
        (torch.ones(2, 3), "index", None),  # which tensors, lists and tuples have as a method
        (torch.ones(2, 3), "T", None),
        ([torch.ones(2), torch.ones(2)], "index", None),
        ((torch.ones(2), torch.ones(2)), "count", None),
        (Sized([1, 2], torch.ones(2)), "__eq__", None),
        ({"items": [1, 2]}, "items", [1, 2]),
        ({"row": [1, 2]}, "items", None),
    ],
)
def test_an_id_is_a_part_of_the_batch_and_no_method(batch: Any, key: str, found: Any) -> None:
    if found is not None:
        assert session._part(batch, key, "batch 0") == found
        return
    with pytest.raises(ValueError, match=f"batch 0: `id_key` is '{key}', which the batch does not have"):
        session._part(batch, key, "batch 0")


def best(output: dict[str, Any]) -> list[dict[str, Any]]:
    rows = zip(output["row"].tolist(), output["scores"].argmax(-1).tolist(), strict=True)
    return [{"name": f"sample {row:g}", "label": label} for row, label in rows]


@pytest.mark.usefixtures("emulated")
def test_what_post_processing_returns_is_written(tmp_path: Path) -> None:
    predict(tmp_path, Scores(), DataLoader(Numbers(), 4), postprocess=best)
    found: Any = trainer("cpu").predict(Scores(), DataLoader(Numbers(), 4))
    table = read_predictions(tmp_path, columns=["name", "label"])
    assert table.to_pylist() == [row for batch in found for row in best(batch)]


def test_what_hooks_do_to_an_output_later_is_not_written(tmp_path: Path) -> None:
    class Spoils(Callback):
        def on_predict_batch_end(self, t: Any, m: Any, outputs: Any, *_: Any) -> None:
            outputs["scores"].fill_(-1)

    ours = trainer(HPUInferenceAccelerator(), [PredictionWriter(tmp_path), Spoils()])
    ours.predict(Scores(), DataLoader(Numbers(), 4))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))


def test_ctrl_c_keeps_what_was_predicted(tmp_path: Path) -> None:
    class Interrupted(Scores):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if batch_idx == 3:
                raise KeyboardInterrupt
            return super().predict_step(batch, batch_idx)

    with pytest.raises((SystemExit, KeyboardInterrupt)):
        predict(tmp_path, Interrupted(), DataLoader(Numbers(), 4))
    assert written(tmp_path) == expected(DataLoader(Numbers(), 4))[:12]


@pytest.mark.parametrize("ragged", [2, 5])
def test_an_error_in_the_thread_is_raised_in_the_run(tmp_path: Path, ragged: int) -> None:
    """At the next batch, or at the end if there is none."""

    class Ragged(Scores):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            found = super().predict_step(batch, batch_idx)
            return found["scores"][:1] if batch_idx == ragged else found["scores"]

    with pytest.raises(ValueError, match=r"(?s)shape \[1, 3\]") as caught:
        predict(tmp_path, Ragged(), DataLoader(Numbers(), 4))
    assert f"batch {ragged} of dataloader 0" in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    predict(tmp_path / "other", Scores(), DataLoader(Numbers(), 4))  # nothing is locked, no thread is left


def test_a_second_run_on_the_path_is_refused(tmp_path: Path) -> None:
    class Nested(Scores):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            if batch_idx == 1:
                predict(tmp_path, Scores(), DataLoader(Numbers(), 4))
            return super().predict_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="Another run writes predictions of rank 0"):
        predict(tmp_path, Nested(), DataLoader(Numbers(), 4))


def test_the_report_has_the_writers_lane(tmp_path: Path) -> None:
    predict(tmp_path / "out", Scores(), DataLoader(Numbers(), 4), trace=tmp_path / "trace")
    spans, _ = chrome.read(tmp_path / "trace" / "trace.json")
    assert [span.batch for span in spans if span.lane == Lane.WRITER] == list(range(6))


def test_small_predictions_have_a_size_in_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of a few bytes each would fill the memory if the queue counted these bytes alone."""
    sizes: list[int] = []

    class Noting(Background[Any]):
        def put(self, item: Any, nbytes: int, where: str = "") -> None:
            sizes.append(nbytes)
            super().put(item, nbytes, where)

    monkeypatch.setattr(session, "Background", Noting)
    predict(tmp_path, Scores(), DataLoader(Numbers(), 1))
    assert len(sizes) == COUNT
    assert min(sizes) > 1024


def test_copies_have_no_run(tmp_path: Path) -> None:
    class Copies(Callback):
        def on_predict_batch_end(self, t: Any, *_: Any) -> None:
            (writer,) = (each for each in t.callbacks if isinstance(each, PredictionWriter))
            assert writer._session is not None
            assert pickle.loads(pickle.dumps(writer))._session is None

    trainer(HPUInferenceAccelerator(), [PredictionWriter(tmp_path), Copies()]).predict(
        Scores(), DataLoader(Numbers(), 4)
    )


class Looks(BasePredictionWriter):
    """Reads what Lightning has noted of all batches, as callbacks of users do."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.seen: Any = None

    def write_on_batch_end(self, *_: Any) -> None: ...

    def on_predict_end(self, t: Any, m: Any) -> None:
        self.seen = list(t.predict_dataloaders.batch_sampler.seen_batch_indices)


@pytest.mark.usefixtures("device")
def test_rule_1_without_our_writer_lightning_remembers_the_indices_of_all_batches() -> None:
    ours, stock = Looks(), Looks()
    trainer(HPUInferenceAccelerator(), [ours]).predict(Scores(), DataLoader(Numbers(), 4))
    trainer("cpu", [stock]).predict(Scores(), DataLoader(Numbers(), 4))
    assert ours.seen == stock.seen
    assert len(stock.seen) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": "scores"}, "Pass a list of names"),
        ({"columns": []}, "`columns` is empty"),
        ({"columns": {}}, "`columns` is empty"),
        ({"compression": "zsdt"}, "`compression` must be one of 'zstd', .*'none', got 'zsdt'"),
        ({"compression": "lzo"}, "`compression` must be one of"),
        ({"compression": "bz2"}, "`compression` must be one of"),
        ({"compression": None}, "`compression` must be one of .* got None"),
        ({"rows_per_file": "10"}, "`rows_per_file` must be an integer, got '10'"),
        ({"rows_per_file": 2.5}, "`rows_per_file` must be an integer, got 2.5"),
        ({"rows_per_file": True}, "`rows_per_file` must be an integer, got True"),
        ({"seconds_per_file": None}, "`seconds_per_file` must be a number, got None"),
        ({"seconds_per_file": float("nan")}, "`seconds_per_file` must be positive, got nan"),
        ({"rows_per_file": 0}, "`rows_per_file` must be positive, got 0"),
        ({"queue_bytes": -1}, "`queue_bytes` must be positive, got -1"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PredictionWriter(tmp_path, **options)
