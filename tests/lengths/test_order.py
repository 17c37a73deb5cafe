"""`group_by_length`: batches of like lengths; whatever the user sees is in the dataset's order."""

import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler, Subset

from lightning_hpu_infer import HPUInferenceAccelerator, PadSpec
from lightning_hpu_infer.lengths.order import grouped_order, lengths_of
from tests.helpers import Net, Writer, assert_equal, predict, trainer

# The lengths of samples, and their order


class Texts(Dataset[dict[str, Any]]):
    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"ids": [0] * self.lengths[at], "row": torch.zeros(self.lengths[at], 2), "number": self.lengths[at]}


TEXTS = Texts([3, 1, 4])


@pytest.mark.parametrize(
    "group_by",
    ["ids", "row", lambda sample: sample["number"], [3, 1, 4], (3, 1, 4), torch.tensor([3, 1, 4])],
    ids=["key", "tensor", "function", "list", "tuple", "lengths in a tensor"],
)
def test_lengths_by_key_function_or_list(group_by: Any) -> None:
    assert lengths_of(TEXTS, [2, 0, 2], group_by) == [4, 3, 4]
    assert all(type(length) is int for length in lengths_of(TEXTS, [0], group_by))


def test_known_lengths_load_no_sample() -> None:
    class Untouched(Texts):
        def __getitem__(self, at: int) -> dict[str, Any]:
            raise AssertionError

    assert lengths_of(Untouched([1, 2]), [1], [5, 6]) == [6]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("dataset", [Stream(), iter([1]), {1, 2}], ids=lambda dataset: type(dataset).__name__)
def test_only_map_style_datasets_can_be_grouped(dataset: Any) -> None:
    with pytest.raises(TypeError, match=f"map-style dataset only, .* {type(dataset).__name__} is not one"):
        lengths_of(dataset, [0], [1, 1, 1])


@pytest.mark.parametrize(
    ("group_by", "error", "message"),
    [
        ("text", ValueError, "Sample 1 has nothing with a length under 'text'. It has 'ids', 'row', 'number'"),
        ("number", ValueError, "Sample 1 has nothing with a length under 'number'"),
        (lambda sample: 1.0, TypeError, "length of sample 1 must be an integer, got 1.0"),
        (lambda sample: True, TypeError, "got True"),
        (lambda sample: None, TypeError, "got None"),
        (lambda sample: -2, ValueError, "length of sample 1 must not be negative, got -2"),
        ([1, 2], ValueError, "has 2 lengths for a dataset of 3 samples"),
    ],
)
def test_lengths_that_are_none(group_by: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lengths_of(TEXTS, [1], group_by)


def test_a_sample_without_keys_says_what_it_is() -> None:
    with pytest.raises(ValueError, match="It has none: it is of type str"):
        lengths_of(["text"], [0], "ids")


@given(st.lists(st.integers(0, 5)))
def test_longest_first_and_otherwise_as_given(lengths: list[int]) -> None:
    order = grouped_order(range(len(lengths)), lengths)
    assert [(-lengths[i], i) for i in order] == sorted((-length, i) for i, length in enumerate(lengths))


# Runs

WORDS = [1 + (5 * i) % 13 for i in range(23)]


class Sentences(Dataset[dict[str, Any]]):
    """Sample i has `WORDS[i]` words, all of them i."""

    def __len__(self) -> int:
        return len(WORDS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"words": [float(index)] * WORDS[index], "index": index}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    longest = max(len(sample["words"]) for sample in samples)
    words = [sample["words"] + [0.0] * (longest - len(sample["words"])) for sample in samples]
    return {"words": torch.tensor(words), "length": torch.tensor([len(sample["words"]) for sample in samples])}


def loader(dataset: Any = None, batch_size: int = 4, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(dataset or Sentences(), batch_size=batch_size, collate_fn=collate, **kwargs)


class Mean(Net):
    def __init__(self) -> None:
        super().__init__()
        self.padded: list[int] = []

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.padded.append(batch["words"].shape[1])
        mean = batch["words"].sum(1) / batch["length"]
        return {"mean": mean, "names": [f"sample {value:.0f}" for value in mean.tolist()], "nothing": None}


BY: list[Any] = ["words", lambda sample: len(sample["words"]), WORDS]


@pytest.mark.smoke
@pytest.mark.parametrize("by", BY, ids=["key", "function", "lengths"])
@pytest.mark.parametrize("pipelining", [True, False])
def test_predictions_are_in_the_datasets_order(pipelining: bool, by: Any) -> None:
    module = Mean()
    expected = predict("cpu", copy.deepcopy(module), loader())
    assert_equal(
        predict(HPUInferenceAccelerator(group_by_length=by, pipelining=pipelining), module, loader()), expected
    )
    longest_first = sorted(WORDS, reverse=True)
    assert module.padded == [longest_first[start] for start in range(0, len(WORDS), 4)]


@pytest.mark.usefixtures("emulated")
def test_on_the_emulated_hpu_twice() -> None:
    ours = trainer(HPUInferenceAccelerator(group_by_length="words", hpu_graphs=False))
    expected = predict("cpu", Mean(), loader())
    for _ in range(2):
        assert_equal(ours.predict(Mean(), loader()), expected)


class Tokens(Sentences):
    """The same as what a tokenizer makes of sentences."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": [1 + index % 7] * WORDS[index]}


def pad_tokens(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    longest = max(len(sample["input_ids"]) for sample in samples)
    ids = [sample["input_ids"] + [0] * (longest - len(sample["input_ids"])) for sample in samples]
    return {"input_ids": torch.tensor(ids), "attention_mask": (torch.tensor(ids) > 0).long()}


class Pooled(Net):
    """Reads the attention mask, as encoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 4)
        self.lengths: list[int] = []

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.lengths.append(batch["input_ids"].shape[1])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        mask = batch["attention_mask"][..., None].float()
        return self.net((self.embedding(batch["input_ids"]) * mask).sum(1) / mask.sum(1))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("flags", [{}, {"num_buckets": 2, "bucket_multiple": 4}, {"bucket_lengths": [8, 16]}], ids=str)
def test_one_flag_groups_buckets_and_pads_the_batches_of_a_tokenizer(flags: dict[str, Any]) -> None:
    tokens: Any = DataLoader(Tokens(), batch_size=4, collate_fn=pad_tokens)
    expected = predict("cpu", Pooled(), tokens)
    module = Pooled()
    assert_equal(predict(HPUInferenceAccelerator(lengths="auto", **flags), module, tokens), expected)
    assert module.lengths[0] == max(WORDS)  # nothing is known of padding before it
    assert module.lengths[1:] == sorted(module.lengths[1:], reverse=True)
    assert len(set(module.lengths[1:])) == 2


def test_one_flag_is_short_for_three() -> None:
    config = HPUInferenceAccelerator(lengths="auto").config
    three = HPUInferenceAccelerator(group_by_length="input_ids", bucket_lengths="auto", pad_spec="tokenizer").config
    assert dataclasses.replace(config, lengths=None) == three
    spec = PadSpec.tokenizer(last_hidden_state=1)
    config = HPUInferenceAccelerator(lengths="auto", group_by_length=len, pad_spec=spec).config
    assert (config.group_by_length, config.bucket_lengths, config.pad_spec) == (len, "auto", spec)
    with pytest.raises(TypeError, match="`lengths` must be 'auto' or None, got True"):
        HPUInferenceAccelerator(lengths=True)  # type: ignore[arg-type]


@pytest.mark.usefixtures("emulated")
def test_order_of_length_without_buckets_says_that_each_length_needs_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        predict(HPUInferenceAccelerator(group_by_length="words"), Mean(), loader())
    assert any("each length needs its own graph" in record.message for record in caplog.records)


@pytest.mark.smoke
@pytest.mark.parametrize("pipelining", [True, False])
def test_writers_get_the_samples_of_each_batch_and_all_of_them_in_order(pipelining: bool) -> None:
    stock, ours = Writer("batch_and_epoch"), Writer("batch_and_epoch")

    class Only(Mean):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().predict_step(batch, batch_idx)["mean"]

    predict("cpu", Only(), loader(), callbacks=[stock])
    accelerator = HPUInferenceAccelerator(group_by_length="words", pipelining=pipelining)
    predict(accelerator, Only(), loader(), callbacks=[ours])
    assert ours.epoch[1] == stock.epoch[1]
    assert_equal(ours.epoch[0], stock.epoch[0])
    # Per batch: what was predicted together, with its own indices.
    assert [batch_idx for _, batch_idx, _, _ in ours.batches] == list(range(6))
    for _, _, indices, prediction in ours.batches:
        assert_equal(prediction, torch.tensor([float(i) for i in indices]))
    assert sorted(i for _, _, indices, _ in ours.batches for i in indices) == list(range(len(WORDS)))


def test_several_dataloaders() -> None:
    loaders = [loader(), loader(Subset(Sentences(), [5, 2, 9, 1, 7]), batch_size=2)]
    expected = predict("cpu", Mean(), loaders)
    assert_equal(predict(HPUInferenceAccelerator(group_by_length="words"), Mean(), loaders), expected)


def test_a_sampler_that_repeats_and_reorders() -> None:
    order = [3, 3, 0, 20, 7, 3, 1]
    loaders = loader(sampler=order)
    expected = predict("cpu", Mean(), loaders)
    assert_equal(predict(HPUInferenceAccelerator(group_by_length="words"), Mean(), loaders), expected)


@pytest.mark.parametrize("limit", [2, 0.5])
def test_a_limit_takes_the_samples_that_stock_takes(limit: float) -> None:
    expected = predict("cpu", Mean(), loader(), limit_predict_batches=limit)
    accelerator = HPUInferenceAccelerator(group_by_length="words")
    assert_equal(predict(accelerator, Mean(), loader(), limit_predict_batches=limit), expected)


class Forever(Sampler[int]):
    """Fails if it is asked for much more than two batches need."""

    def __iter__(self) -> Any:
        for place in count():
            assert place < 20, "asked for all of an endless sampler"
            yield place % 7


def test_an_endless_sampler_up_to_the_limit() -> None:
    loaders = loader(sampler=Forever())
    expected = predict("cpu", Mean(), loaders, limit_predict_batches=2)
    accelerator = HPUInferenceAccelerator(group_by_length="words")
    assert_equal(predict(accelerator, Mean(), loaders, limit_predict_batches=2), expected)


def test_worker_processes() -> None:
    loaders = loader(num_workers=1)
    expected = predict("cpu", Mean(), loader())
    assert_equal(predict(HPUInferenceAccelerator(group_by_length=WORDS), Mean(), loaders), expected)


def test_without_stored_predictions_nothing_is_kept() -> None:
    module = Mean()
    ours = trainer(HPUInferenceAccelerator(group_by_length="words"))
    assert ours.predict(module, loader(), return_predictions=False) is None
    assert len(module.padded) == 6


def test_the_users_dataloader_stays_as_it_was() -> None:
    mine = loader()
    predict(HPUInferenceAccelerator(group_by_length="words"), Mean(), mine)
    assert_equal(predict("cpu", Mean(), mine), predict("cpu", Mean(), loader()))


def test_an_output_that_cannot_be_split_is_refused_at_the_first_batch() -> None:
    class Total(Mean):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().predict_step(batch, batch_idx)["mean"].sum()

    module = Total()
    with pytest.raises(ValueError, match=r"tensor of shape \(\)"):
        predict(HPUInferenceAccelerator(group_by_length="words"), module, loader())
    assert len(module.padded) <= 2  # one more was in flight


class Stops(Mean):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == self.at:
            raise StopIteration
        return super().predict_step(batch, batch_idx)


@pytest.mark.parametrize("pipelining", [True, False])
def test_stop_iteration_of_a_step_is_an_error_since_the_predictions_so_far_cannot_be_put_in_order(
    pipelining: bool,
) -> None:
    assert len(predict("cpu", Stops(3), loader())) == 3
    ours = trainer(HPUInferenceAccelerator(group_by_length="words", pipelining=pipelining))
    with pytest.raises(ValueError, match=r"ended after 3 of 6 batches.*StopIteration.*pass `group_by_length=None`"):
        ours.predict(Stops(3), loader())
    assert_equal(ours.predict(Mean(), loader()), predict("cpu", Mean(), loader()))


@pytest.mark.parametrize("pipelining", [True, False])
def test_stop_iteration_of_a_first_step_ends_the_run_quietly(pipelining: bool) -> None:
    accelerator = HPUInferenceAccelerator(group_by_length="words", pipelining=pipelining)
    assert predict(accelerator, Stops(0), loader()) == predict("cpu", Stops(0), loader()) == []


class Endless(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Any:
        return (Sentences()[i] for i in range(4))


class Backwards(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


class AnyOrder(DataLoader[Any]):
    in_order = property(lambda self: False, lambda self, value: None)  # an argument since torch 2.6


@pytest.mark.parametrize(
    ("loaders", "error", "message"),
    [
        (DataLoader(Endless(), 2), MisconfigurationException, "needs a DataLoader of a map-style dataset"),
        ([[torch.ones(2)]], MisconfigurationException, "needs a DataLoader of a map-style dataset"),
        (
            DataLoader(Sentences(), batch_sampler=type("Own", (BatchSampler,), {})(SequentialSampler(WORDS), 2, False)),
            MisconfigurationException,
            "with Own",
        ),
        (Backwards(Sentences(), 2), MisconfigurationException, "Backwards has `__iter__` of its own"),
        (AnyOrder(Sentences(), 2, num_workers=1), MisconfigurationException, "AnyOrder has `in_order=False`"),
        (DataLoader(Sentences(), 2), ValueError, "under 'text'"),
    ],
    ids=["iterable dataset", "list", "own batch sampler", "own batches", "any order", "key that is not there"],
)
def test_what_cannot_be_grouped_is_refused(loaders: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict(HPUInferenceAccelerator(group_by_length="text"), Mean(), loaders)


def test_a_flag_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError, match="`group_by_length` must be a key, a function or a list of lengths, got 3"):
        HPUInferenceAccelerator(group_by_length=3)  # type: ignore[arg-type]


def test_per_sample_tensors_of_different_lengths_come_back_in_a_list() -> None:
    class PerToken(Mean):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            rows: list[Tensor] = [row[:n] for row, n in zip(batch["words"], batch["length"].tolist(), strict=True)]
            return rows

    expected = predict("cpu", PerToken(), loader())
    assert_equal(predict(HPUInferenceAccelerator(group_by_length="words"), PerToken(), loader()), expected)
