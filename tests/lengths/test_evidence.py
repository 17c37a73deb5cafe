"""`lengths="auto"` pads only what can be seen to bear it: else predictions are stock's, or there is an error."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_hpu_infer import HPUInferenceAccelerator, InferenceConfig, InferencePipeline, PadSpec
from lightning_hpu_infer.lengths.buckets import Buckets
from tests.helpers import Broken, Net, assert_equal, predict

MANY = [3, 20, 7, 31, 12, 5, 9, 17, 2, 28, 14, 6]
TWO = [5] * 4 + [6] * 4


class Tokens(Dataset[Any]):
    def __init__(self, lengths: Sequence[int], *more: int) -> None:
        self.lengths, self.more = lengths, more

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        shape = (*self.more, self.lengths[index])
        return {"input_ids": torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(index))}


def padded(samples: list[Any], side: str = "right") -> dict[str, Tensor]:
    rows = [sample["input_ids"] for sample in samples]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def loader(lengths: Sequence[int], side: str = "right", batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(Tokens(lengths), batch_size, collate_fn=lambda samples: padded(samples, side))


class Model(Net):
    """Scores of tokens, with their context, of which `show` gives something."""

    def __init__(self, show: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.show = show
        self.lengths: list[int] = []

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.lengths.append(batch["input_ids"].shape[1])
        mask = batch["attention_mask"][..., None].float()
        states = self.embedding(batch["input_ids"]) * mask
        return self.show(self.net(states + states.sum(1, keepdim=True) / mask.sum(1, keepdim=True)), mask[..., 0])


def pooled(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores * mask[..., None]).sum(1)


def last(scores: Tensor, mask: Tensor) -> Tensor:
    return scores[:, -1]


def own_lengths(scores: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[: int(real.sum())] for row, real in zip(scores, mask, strict=True)]


def as_wide_as_a_bucket(scores: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"wide": pooled(scores, mask).repeat(1, 11)[:, :32], "eight": pooled(scores, mask).repeat(1, 3)[:, :8]}


def run(show: Callable[[Tensor, Tensor], Any], data: DataLoader[Any], **flags: Any) -> list[int]:
    """Predictions are stock's; gives the lengths that steps have seen."""
    expected, model = predict("cpu", Model(show), data), Model(show)
    assert_equal(predict(HPUInferenceAccelerator(lengths="auto", **flags), model, data), expected)
    return model.lengths


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("show", [pooled, own_lengths, as_wide_as_a_bucket])
def test_once_padding_on_the_right_is_seen_batches_are_padded(show: Any) -> None:
    seen = run(show, loader(MANY * 3, batch_size=5), num_buckets=2)
    assert len(seen) == 8
    assert len(set(seen[1:])) == 2  # the first shows it


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("show", [pooled, last])
@pytest.mark.parametrize(("lengths", "size"), [(TWO, 4), (MANY, 1)])
def test_batches_that_do_not_show_where_they_are_padded_are_not(show: Any, lengths: list[int], size: int) -> None:
    assert sorted(set(run(show, loader(lengths, "left", size)))) == sorted(set(lengths))


def test_padding_on_the_left_is_refused() -> None:
    data = loader([*MANY, *TWO], "left")
    with pytest.raises(ValueError, match=r"begins with 0: it is padded on the left.*tokenizer\(side='left'\)"):
        predict(HPUInferenceAccelerator(lengths="auto"), Model(last), data)
    assert len(set(run(last, data, num_buckets=2, pad_spec=PadSpec.tokenizer(side="left")))) == 2


PER_TOKEN: dict[str, Any] = {
    "scores": lambda scores, mask: scores,
    "labels": lambda scores, mask: {"labels": scores.argmax(-1), "pooled": pooled(scores, mask)},
    "without the first": lambda scores, mask: (scores[:, 1:],),
    "lists": lambda scores, mask: [row.tolist() for row in scores],
    "arrays": lambda scores, mask: {"labels": list(scores.argmax(-1).cpu().numpy())},
    "pairs": lambda scores, mask: [{"x": row @ row.T} for row in scores],
}


@pytest.mark.parametrize("kind", PER_TOKEN)
@pytest.mark.parametrize("lengths", [MANY, [8, 5, 6, 7, 8, 5], [3, 3, 8, 5, 2, 6]])
def test_an_output_that_grows_with_the_padding_is_refused(kind: str, lengths: list[int]) -> None:
    """Before a batch with such an output is handed out."""
    buckets = Buckets(InferenceConfig(lengths="auto"))
    buckets.start([])

    def predicted(length: int) -> bool:
        batch = padded([{"input_ids": torch.ones(n, dtype=torch.long)} for n in (length, 1, 1)])
        longer, found = buckets.pad(batch)
        mask = longer["attention_mask"].float()
        output = PER_TOKEN[kind](torch.ones(*mask.shape, 3), mask)
        assert found is not None
        assert buckets.cut(output, found) is output
        return found.real == found.padded

    with pytest.raises(ValueError, match=r"has the padded length in dimension \d: .*`outputs` of a `pad_spec`"):
        assert all(map(predicted, lengths))


def test_empty_texts_show_nothing() -> None:
    buckets = Buckets(InferenceConfig(lengths="auto"))
    empty = torch.zeros(2, 0, dtype=torch.long)
    assert buckets.pad({"input_ids": empty, "attention_mask": empty})[1] == (0, 0)
    batch = padded([{"input_ids": torch.ones(n, dtype=torch.long)} for n in (5, 0, 5)])
    assert buckets.pad(batch)[1] == (5, 5)


def test_a_spec_says_what_is_cut() -> None:
    named = PadSpec.tokenizer(labels=1)
    buckets = Buckets(InferenceConfig(lengths="auto", pad_spec=named))
    batch = padded([{"input_ids": torch.ones(5, dtype=torch.long)}])
    longer, found = buckets.pad(batch)
    assert buckets.cut({"labels": longer["input_ids"]}, found)["labels"].shape == (1, 5)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (DataLoader(Tokens([6] * 4), 2), "a NoneType"),
        (DataLoader(Tokens([6] * 4, 4), 2), r"shape \(2, 4, 6\) and a NoneType"),
    ],
)
def test_what_is_no_batch_of_a_tokenizer_is_refused(data: DataLoader[Any], found: str) -> None:
    with pytest.raises(ValueError, match=rf"`lengths='auto'` pads `input_ids` .*{found}.*leave out `lengths`"):
        predict(HPUInferenceAccelerator(lengths="auto"), Model(pooled), data)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Tokens(TWO))


@pytest.mark.parametrize(
    ("show", "data"),
    [(pooled, DataLoader(Stream(), 2, collate_fn=padded)), (lambda scores, mask: "text", loader(TWO))],
)
def test_messages_say_to_leave_out_the_flag_that_was_given(show: Any, data: DataLoader[Any]) -> None:
    with pytest.raises(Exception, match="pass `group_by_length=None`, and no `lengths`"):
        predict(HPUInferenceAccelerator(lengths="auto"), Model(show), data)


# Without a Trainer a batch may fail, be cancelled, or run in another order, and the others go on.


def batch_of(length: int, value: int = 1) -> dict[str, Tensor]:
    """Two sentences, of which the second one is shorter."""
    return padded([{"input_ids": torch.full((n,), value)} for n in (length, length - 1)])


class PerToken(nn.Module):
    """Gives a value per token; fails on a 9, and waits until it may begin."""

    def __init__(self) -> None:
        super().__init__()
        self.may_begin, self.entered = threading.Event(), threading.Event()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.entered.set()
        assert self.may_begin.wait(60)
        if (batch["input_ids"] == 9).any():
            raise Broken("a 9")
        return batch["input_ids"] * batch["attention_mask"]


def one_by_one(pipeline: InferencePipeline, model: PerToken) -> list[Future[Any]]:
    return []


def behind_an_error(pipeline: InferencePipeline, model: PerToken) -> list[Future[Any]]:
    return [pipeline.submit(batch_of(7, 9)), pipeline.submit(batch_of(20))]


def behind_one_that_is_cancelled(pipeline: InferencePipeline, model: PerToken) -> list[Future[Any]]:
    model.may_begin.clear()
    first = pipeline.submit(batch_of(7, 9))
    assert model.entered.wait(60)
    second = pipeline.submit(batch_of(9))
    assert second.cancel()
    return [first, pipeline.submit(batch_of(20))]


def from_threads(pipeline: InferencePipeline, model: PerToken) -> list[Future[Any]]:
    model.may_begin.clear()
    barrier = threading.Barrier(6)

    def submit(length: int) -> Future[Any]:
        barrier.wait(60)
        return pipeline.submit(batch_of(length))

    with ThreadPoolExecutor(6) as threads:
        return list(threads.map(submit, [7, 20, 10, 33, 21, 13]))


@pytest.mark.usefixtures("device")
@pytest.mark.filterwarnings("ignore:A part of `predict_step` runs without an HPU graph")
@pytest.mark.parametrize("begin", [one_by_one, behind_an_error, behind_one_that_is_cancelled, from_threads])
def test_a_pipeline_hands_out_no_output_of_another_length_however_often_it_is_asked(begin: Any) -> None:
    def length_of(future: Future[Any]) -> int | None:
        return None if isinstance(future.exception(60), ValueError | Broken) else future.result().shape[1]

    model = PerToken()
    model.may_begin.set()
    with InferencePipeline(model, config=InferenceConfig(lengths="auto")) as pipeline:
        first = begin(pipeline, model)
        model.may_begin.set()
        wait(first)
        assert {length_of(future) for future in first} <= {7, 20, 10, 33, 21, 13, None}
        lengths = [7, 19, 8, 10, 33, 21, 35]
        found = [length_of(pipeline.submit(batch_of(length))) for length in lengths]
        assert all(each in (None, length) for each, length in zip(found, lengths, strict=True))
        # Until two lengths were seen they are as they are, and afterwards each is refused that would be padded.
        assert found[2] == 8
        assert found[3:] == [None] * 4
        for _ in range(2):
            with pytest.raises(ValueError, match="has the padded length in dimension 1"):
                list(pipeline.predict([batch_of(10)]))


@pytest.mark.usefixtures("device")
def test_a_pipeline_pads_once_a_batch_of_another_length_was_seen() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            self.seen.append(batch["input_ids"].shape[1])
            return (batch["input_ids"] * batch["attention_mask"]).sum(1)

    model = Pooled()
    with InferencePipeline(model, config=InferenceConfig(lengths="auto", hpu_graphs=False)) as pipeline:
        for length in (7, 7, 9, 10, 17, 16):
            assert pipeline.submit(batch_of(length)).result(60).tolist() == [length, length - 1]
    assert model.seen == [7, 8, 16, 16, 24, 16]  # a batch of another length shows enough
