import math
import pickle
import random
import sys
from collections import OrderedDict, UserDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad as torch_pad
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from lightning_hpu_infer.graphs.padding import pad_rows
from lightning_hpu_infer.lengths.optimal import best_buckets, bucket_of, padding_waste
from lightning_hpu_infer.lengths.pad import Pad, PadSpec
from tests.helpers import assert_equal

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=14)
COUNTS = st.integers(1, 6)
MULTIPLES = st.sampled_from([1, 2, 7, 8])


def cost(lengths: Sequence[int], buckets: Sequence[int]) -> int:
    return padding_waste(lengths, buckets)[0]


def aligned(length: float, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


def percentiles(lengths: Sequence[int], count: int, multiple: int) -> list[int]:
    """Habana's "best simple" buckets: as many samples in each."""
    ordered = sorted(lengths)
    ends = [ordered[math.ceil(len(ordered) * k / count) - 1] for k in range(1, count + 1)]
    return sorted({aligned(end, multiple) for end in ends})


def ladder(lengths: Sequence[int], count: int, multiple: int) -> list[int]:
    """Ends that grow by a constant factor."""
    low, high = min(lengths), max(lengths)
    return sorted(
        {aligned(low * (high / low) ** (k / count), multiple) for k in range(1, count)} | {aligned(high, multiple)}
    )


@given(LENGTHS, COUNTS, MULTIPLES)
def test_no_other_buckets_pad_less(lengths: list[int], count: int, multiple: int) -> None:
    buckets = best_buckets(lengths, count, multiple)
    *ends, top = sorted({aligned(length, multiple) for length in lengths})
    others = [[*chosen, top] for k in range(min(count, len(ends) + 1)) for chosen in combinations(ends, k)]
    assert cost(lengths, buckets) == min(cost(lengths, other) for other in others)


@given(LENGTHS, COUNTS, MULTIPLES)
def test_buckets_are_few_ascending_aligned_and_hold_everything(lengths: list[int], count: int, multiple: int) -> None:
    buckets = best_buckets(iter(lengths), count, multiple)
    assert len(buckets) <= count
    assert buckets == sorted(set(buckets))
    assert all(bucket % multiple == 0 for bucket in buckets)
    assert buckets[-1] == aligned(max(lengths), multiple)


@given(LENGTHS, COUNTS, MULTIPLES)
def test_more_buckets_never_pad_more(lengths: list[int], count: int, multiple: int) -> None:
    fewer, more = (best_buckets(lengths, k, multiple) for k in (count, count + 1))
    assert cost(lengths, more) <= cost(lengths, fewer)


@given(LENGTHS, COUNTS, MULTIPLES)
def test_usual_heuristics_are_never_better(lengths: list[int], count: int, multiple: int) -> None:
    best = cost(lengths, best_buckets(lengths, count, multiple))
    for heuristic in (percentiles, ladder):
        other = heuristic(lengths, count, multiple)
        assert len(other) <= count
        assert best <= cost(lengths, other)


@given(LENGTHS, COUNTS, st.randoms(use_true_random=False))
def test_the_order_of_lengths_does_not_matter(lengths: list[int], count: int, rng: random.Random) -> None:
    shuffled = rng.sample(lengths, len(lengths))
    assert best_buckets(shuffled, count) == best_buckets(lengths, count)


def test_enough_buckets_pad_nothing_but_the_alignment() -> None:
    assert best_buckets([3, 9, 9, 4], 10) == [3, 4, 9]
    assert best_buckets([3, 9, 9, 4], 10, multiple=8) == [8, 16]
    assert best_buckets([3, 9, 9, 4], 1) == [9]


def test_twice_as_many_distinct_lengths_take_twice_as_long() -> None:
    """Counted in lines of Python. All pairs of lengths would be four times as many."""

    def lines(distinct: int) -> int:
        executed = 0

        def count(frame: FrameType, event: str, _: object) -> Any:
            nonlocal executed
            executed += event == "line"
            return count

        before = sys.gettrace()
        sys.settrace(count)
        try:
            best_buckets(range(1, distinct + 1), 8)
        finally:
            sys.settrace(before)
        return executed

    assert lines(500) < 2.5 * lines(250)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4), "at least one, got none"),
        (([3, 0], 4), "must be positive, and at least one, got 0"),
        (([-1], 4), "got -1"),
        (([3], 0), "`count` and `multiple` must be positive, got 0 and 1"),
        (([3], 4, 0), "got 4 and 0"),
    ],
)
def test_nonsense_has_no_buckets(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_buckets(*arguments)


def test_a_length_goes_into_the_smallest_bucket_that_holds_it() -> None:
    assert [bucket_of(length, [4, 8]) for length in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, None]
    assert bucket_of(1, []) is None


def test_waste_counts_lengths_above_the_largest_bucket_as_they_are() -> None:
    assert padding_waste([1, 4, 9], [4, 8]) == (4 + 4 + 9, 14)


# Padding


class Pair(NamedTuple):
    x: Tensor
    name: str


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    name: str


@dataclass(slots=True)
class Slots:
    x: Tensor


class Named(UserDict[str, Any]):
    """A mapping with an attribute beside its items."""

    note = ""


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(SHAPES, st.data(), st.integers(0, 3), st.sampled_from(["right", "left"]))
def test_padding_is_torchs_and_cutting_undoes_it(shape: list[int], data: st.DataObject, more: int, side: Any) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    dtype = data.draw(
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
    )
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    spec = PadSpec(inputs={"": Pad(dim, 1)}, outputs={"": dim}, side=side)

    padded = spec.pad(tensor, shape[dim] + more)

    last = tensor.movedim(dim, -1)
    expected = torch_pad(last, (0, more) if side == "right" else (more, 0), value=1).movedim(-1, dim)
    torch.testing.assert_close(padded, expected, rtol=0, atol=0)
    assert spec.length_of(padded) == shape[dim] + more
    assert (padded is tensor) == (more == 0)
    torch.testing.assert_close(spec.cut(padded, shape[dim], shape[dim] + more), tensor, rtol=0, atol=0)
    torch.testing.assert_close(spec.narrow(padded, shape[dim]), tensor, rtol=0, atol=0)


def x_of(batch: Any) -> Tensor:
    return batch.x if hasattr(batch, "x") else batch["x"]


@pytest.mark.parametrize(
    "batch",
    [
        {"x": torch.ones(2, 3), "name": "a"},
        OrderedDict(x=torch.ones(2, 3)),
        MappingProxyType({"x": torch.ones(2, 3)}),
        UserDict({"x": torch.ones(2, 3)}),
        Named({"x": torch.ones(2, 3)}),
        BatchEncoding({"x": torch.ones(2, 3), "names": ["a", "b"]}),
        Pair(torch.ones(2, 3), "a"),
        Frozen(torch.ones(2, 3), "a"),
        Slots(torch.ones(2, 3)),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_collections_keep_their_type_and_the_given_one_stays(batch: Any) -> None:
    if isinstance(batch, Named):
        batch.note = "kept"
    padded = PadSpec(inputs={"x": Pad(1)}).pad(batch, 5)
    assert type(padded) is type(batch)
    assert padded is not batch
    assert (x_of(batch).shape, x_of(padded).shape) == ((2, 3), (2, 5))
    assert getattr(padded, "name", None) == getattr(batch, "name", None)
    assert getattr(padded, "note", None) == getattr(batch, "note", None)


def test_names_reach_into_nested_batches() -> None:
    tokens, mask, label = torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool), torch.zeros(2)
    batch: list[Any] = [({"tokens": tokens}, Frozen(mask, "a")), label]
    spec = PadSpec(inputs={"0.0.tokens": Pad(-1, 9), "0.1.x": Pad(0, False)})
    padded = spec.pad(batch, 4)
    assert_equal(padded[0][0]["tokens"], torch_pad(tokens, (0, 1), value=9))
    assert_equal(padded[0][1].x, torch_pad(mask, (0, 0, 0, 1)))
    assert padded[1] is label
    assert batch[0][0]["tokens"] is tokens


def test_keys_may_be_integers() -> None:
    assert PadSpec(inputs={"0": Pad(0)}).length_of({0: torch.ones(3)}) == 3


def test_tokenizer_batches() -> None:
    spec = PadSpec.tokenizer(pad_token_id=7, last_hidden_state=1)
    ids = torch.ones(2, 3, dtype=torch.long)
    padded = spec.pad(BatchEncoding({"input_ids": ids, "attention_mask": ids.int()}), 4)
    assert padded["input_ids"].tolist() == [[1, 1, 1, 7]] * 2
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 0]] * 2
    output = BaseModelOutput(last_hidden_state=torch.ones(2, 4, 8))
    cut = spec.cut(output, 3, 4)
    assert type(cut) is BaseModelOutput
    assert cut[0].shape == (2, 3, 8)
    left = PadSpec.tokenizer(side="left").pad({"input_ids": ids, "token_type_ids": None}, 4)
    assert left["input_ids"].tolist() == [[0, 1, 1, 1]] * 2
    assert left["token_type_ids"] is None


def test_without_named_outputs_the_output_stays_as_it_is() -> None:
    output = object()
    assert PadSpec.tokenizer().cut(output, 3, 4) is output


def test_outputs_are_cut_on_their_device(device: str) -> None:
    spec = PadSpec(inputs={"": Pad(1)}, outputs={"logits": 1})
    output = {"logits": torch.arange(8.0, device="hpu" if device == "emulator" else device).reshape(2, 4), "n": 4}
    cut = spec.cut(output, 3, 4)
    assert cut["logits"].device == output["logits"].device  # type: ignore[attr-defined]
    assert cut["logits"].cpu().tolist() == [[0, 1, 2], [4, 5, 6]]


def test_a_spec_pickles() -> None:
    spec = PadSpec.tokenizer(3, side="left", last_hidden_state=1)
    assert pickle.loads(pickle.dumps(spec)) == spec


IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": IDS, "a": (IDS,)}, r"no tensor `input_ids`, .* It has `ids` \(2, 3\), `a.0` \(2, 3\)\."),
        ({"input_ids": [1, 2]}, r"no tensor `input_ids` \(it is of type list\)"),
        ({"input_ids": IDS, "attention_mask": 3}, r"no tensor `attention_mask` \(it is of type int\)"),
        (IDS, "no tensor `input_ids`, .* It has none: it is of type Tensor"),
        ("text", "none: it is of type str"),
        ({"input_ids": torch.ones(3)}, r"`input_ids` has no dimension 1: its shape is \(3,\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, "differ in length: `input_ids` 3, `attention_mask` 4"),
    ],
)
def test_a_batch_that_is_not_as_the_spec_says(batch: Any, message: str) -> None:
    for use in (
        PadSpec.tokenizer().length_of,
        lambda b: PadSpec.tokenizer().pad(b, 9),
        lambda b: PadSpec.tokenizer().narrow(b, 1),
    ):
        with pytest.raises(ValueError, match=message):
            use(batch)


def test_a_batch_is_not_padded_to_less_than_it_has() -> None:
    with pytest.raises(ValueError, match="A batch of length 3 cannot be padded to 2"):
        PadSpec.tokenizer().pad({"input_ids": IDS}, 2)


def test_integers_are_not_padded_with_what_they_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"itself of dtype torch.int64 cannot be padded with -inf"):
        PadSpec(inputs={"": Pad(1, -math.inf)}).pad(IDS, 4)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"states": IDS}, r"no tensor `logits`, .* It has `states` \(2, 3\)"),
        ({"logits": torch.ones(2)}, "no dimension 1"),
        ({"logits": torch.ones(2, 2)}, r"of shape \(2, 2\) has not the padded length 4 in dimension 1"),
        ({"logits": torch.ones(2, 384)}, r"of shape \(2, 384\) has not the padded length 4"),
    ],
)
def test_an_output_that_is_not_as_the_spec_says(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PadSpec.tokenizer(logits=1).cut(output, 3, 4)


def test_a_spec_is_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="`inputs` of a `PadSpec` is empty"):
        PadSpec(inputs={})
    with pytest.raises(TypeError, match=r"Input 'x' must be described by a `Pad`, .* got 1"):
        PadSpec(inputs={"x": 1})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"Output 'y' must be described by a dimension, .* got '1'"):
        PadSpec(inputs={"x": Pad(1)}, outputs={"y": "1"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="must be 'right' or 'left', got 'both'"):
        PadSpec(inputs={"x": Pad(1)}, side="both")  # type: ignore[arg-type]


def test_rows_are_filled_up_with_the_last_one() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]])
    assert pad_rows(tensor, 4).tolist() == [[1, 2], [3, 4], [3, 4], [3, 4]]
    assert pad_rows(tensor, 2) is tensor
    assert pad_rows(torch.tensor([True]), 2).tolist() == [True, True]
    for wrong in (torch.ones(3), torch.ones(0), torch.ones(())):
        with pytest.raises(ValueError, match="cannot be filled up to 2 rows"):
            pad_rows(wrong, 2)
