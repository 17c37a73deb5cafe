"""What a `PadSpec` pads, what it cuts back, and what it refuses."""

import math
import pickle
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad as torch_pad
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from lightning_hpu_infer.lengths.pad import Pad, PadSpec
from tests.helpers import assert_equal


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
        ({"logits": torch.ones(2, 2)}, r"of shape \(2, 2\) does not have the padded length 4 in dimension 1"),
        ({"logits": torch.ones(2, 384)}, r"of shape \(2, 384\) does not have the padded length 4"),
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
