"""Outputs of batches in another order: cut into samples, and joined again as the batches that stock has."""

from collections import OrderedDict, UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from lightning_hpu_infer.lengths.order import grouped_order
from lightning_hpu_infer.lengths.restore import Restorer
from tests.helpers import assert_equal


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Record:
    x: Any
    y: Any = None


@dataclass(frozen=True)
class Frozen:
    x: Any


def numbers(indices: Sequence[int]) -> Tensor:
    return torch.tensor(indices)


def vectors(indices: Sequence[int]) -> Tensor:
    return torch.tensor(indices, dtype=torch.float64)[:, None] / torch.arange(1, 4)


def ragged(indices: Sequence[int]) -> list[Tensor]:
    return [torch.full((9 + i % 3, 2), float(i)) for i in indices]  # never as many rows as a batch has samples


OUTPUTS: dict[str, Callable[[Sequence[int]], Any]] = {
    "numbers": numbers,
    "vectors": vectors,
    "bools": lambda indices: vectors(indices) > 1,
    "ragged": ragged,
    "strings": lambda indices: [str(i) for i in indices],
    "integers": lambda indices: list(indices),
    "0-dim": lambda indices: [torch.tensor(i) for i in indices],
    "some None": lambda indices: [None if i % 2 else "even" for i in indices],
    "detections": lambda indices: [{"boxes": row, "score": torch.tensor(1.0)} for row in ragged(indices)],
    "None": lambda indices: None,
    "dict": lambda indices: {"x": vectors(indices), "none": None},
    "ordered dict": lambda indices: OrderedDict(x=vectors(indices)),
    "user dict": lambda indices: UserDict(x=vectors(indices)),
    "empty": lambda indices: {},
    "tuple": lambda indices: (numbers(indices), vectors(indices)),
    "list": lambda indices: [numbers(indices)] * 9,
    "named tuple": lambda indices: Pair(numbers(indices), ragged(indices)),
    "dataclass": lambda indices: Record(numbers(indices)),
    "frozen": lambda indices: Frozen(numbers(indices)),
    "nested": lambda indices: {"a": ({"b": Record(vectors(indices), [str(i) for i in indices])}, None)},
    "model output": lambda indices: BaseModelOutputWithPooling(pooler_output=vectors(indices)),
    "keys in turn": lambda indices: dict(
        sorted({"x": numbers(indices), "y": vectors(indices)}.items(), reverse=bool(indices[0] % 2))
    ),
}


def assert_alike(actual: Any, expected: Any) -> None:
    """`assert_equal`, and into dataclasses and mappings too."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict | UserDict):
        assert set(actual) == set(expected)
        for name in expected:
            assert_alike(actual[name], expected[name])
    elif isinstance(expected, Record | Frozen):
        assert_alike(vars(actual), vars(expected))
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_alike(one, other)
    else:
        assert_equal(actual, expected)
        if isinstance(expected, Tensor):
            assert actual.dtype == expected.dtype


def batches_of(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def restored(
    order: Sequence[int], lengths: Sequence[int], size: int, step: Callable[[Sequence[int]], Any]
) -> list[Any]:
    restorer = Restorer(order, size)
    assert restorer.batch_indices() == batches_of(order, size)
    for batch in batches_of(grouped_order(order, lengths), size):
        restorer.add(batch, step(batch))
    return restorer.batches()


@pytest.mark.parametrize("name", OUTPUTS)
@settings(max_examples=40)
@given(
    st.one_of(
        st.lists(st.integers(0, 30), min_size=1, max_size=20),  # with repeats, as of an oversampling sampler
        st.permutations(range(11)),
        st.just(range(17)),
    ),
    st.integers(1, 8),
    st.randoms(use_true_random=False),
)
def test_outputs_of_grouped_batches_equal_those_of_stock_batches(
    name: str, order: list[int], size: int, rng: Any
) -> None:
    step = OUTPUTS[name]
    lengths_by_index = [rng.randint(1, 9) for _ in range(31)]
    expected = [step(batch) for batch in batches_of(order, size)]
    assert_alike(restored(order, [lengths_by_index[i] for i in order], size, step), expected)


@pytest.mark.parametrize("output", [torch.tensor(3.0), torch.ones(5, 2), 0.5, "text", {"loss": 1.0}], ids=str)
def test_batches_of_one_sample_are_put_back_whole(output: Any) -> None:
    restorer = Restorer([4, 2], 1)
    restorer.add([2], output)
    restorer.add([4], "other")
    assert restorer.batches() == ["other", output]


def test_the_same_sample_twice_is_two_predictions() -> None:
    restorer = Restorer([5, 5, 1, 5], 2)
    for batch, output in (([5, 5], [10, 11]), ([5, 1], [12, 13])):
        restorer.add(batch, torch.tensor(output))
    assert_equal(restorer.batches(), [torch.tensor([10, 11]), torch.tensor([13, 12])])


def test_indices_may_be_of_any_integer_type() -> None:
    restorer = Restorer([torch.tensor(1), 0], 2)  # type: ignore[list-item]
    restorer.add(torch.tensor([0, 1]).unbind(), torch.tensor([0, 1]))  # type: ignore[arg-type]
    assert restorer.batch_indices() == [[1, 0]]
    assert_equal(restorer.batches(), [torch.tensor([1, 0])])


def test_nothing_is_copied_before_the_end() -> None:
    restorer, output = Restorer(range(4), 2), torch.tensor([2.0, 3.0])
    restorer.add([2, 3], output)
    restorer.add([0, 1], torch.zeros(2))
    output += 10
    assert restorer.batches()[1].tolist() == [12, 13]


def test_tensors_stay_on_their_device_and_in_inference_mode(device: str) -> None:
    restorer = Restorer(range(3), 2)
    with torch.inference_mode():
        for batch in ([2, 1], [0]):
            restorer.add(batch, torch.tensor(batch, device="hpu" if device == "emulator" else device))
    first, second = restorer.batches()
    assert first.device.type == ("hpu" if device == "emulator" else device)
    assert (first.cpu().tolist(), second.cpu().tolist()) == ([0, 1], [2])


def test_no_samples_are_no_batches() -> None:
    assert Restorer([], 4).batches() == []
    assert Restorer([], 4).batch_indices() == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.tensor(1.0), r"The output is a tensor of shape \(\), .* 3 samples .* one row per sample.*None"),
        ({"x": torch.ones(3), "loss": torch.tensor(1.0)}, r"The output at `loss` is a tensor of shape \(\)"),
        ((torch.ones(3), {"w": torch.ones(4, 3)}), r"The output at `1.w` is a tensor of shape \(4, 3\)"),
        ([torch.ones(3), 0.5], r"The output at `1` is 0.5, which does not tell"),
        ("abc", "The output is a str, "),
        ({"text": "abc"}, "The output at `text` is a str, "),
        (("a", "b", "c"), "The output at `0` is a str, "),
        (torch.eye(3).to_sparse(), "a tensor of layout torch.sparse_coo"),
    ],
)
def test_what_belongs_to_no_sample_is_refused_at_once(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Restorer(range(9), 3).add([0, 1, 2], output)


@pytest.mark.parametrize(
    "output",
    [
        [torch.ones(3, 2)] * 3,
        [torch.ones(3), None, None],
        [torch.ones(3, 2), torch.ones(3), torch.tensor(1.0)],
        [torch.ones(5, 2), torch.ones(()), torch.ones(())],
        [["a", "b", "c"]] * 3,
        [{"x": torch.ones(3)}] * 3,
        {"a": [(torch.ones(3), None)] * 3},
    ],
    ids=range(7),
)
def test_lists_that_can_be_read_in_two_ways_are_refused(output: Any) -> None:
    with pytest.raises(
        ValueError, match=r"is a list of 3 elements for a batch of 3 samples: one .* another batch size"
    ):
        Restorer(range(9), 3).add([0, 1, 2], output)


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        (torch.ones(3, 7), torch.ones(2, 5), r"rows of shape \(5,\), and had rows of shape \(7,\) .* one tensor per"),
        (torch.ones(3), torch.ones(2).int(), r"torch.int32 on cpu, and was a tensor .* torch.float32"),
        (torch.ones(3), None, r"The output is None, and was a tensor with rows of shape \(\)"),
        (None, torch.ones(2), "and was None in the first batch"),
        (torch.ones(3), torch.ones(3), r"tensor of shape \(3,\), which does not tell .* 2 samples"),
        (torch.ones(3), [1, 2], "is a list of 0, 1, and was a tensor"),
        (["a"] * 3, ["a"] * 3, "is a list of 0, 1, 2, and was a list with one element per sample"),
        (["a"] * 3, "ab", "is a str, which does not tell"),
        ([torch.ones(3)] * 2, [torch.ones(2)] * 1, "is a list of 0, and was a list of 0, 1 in the first batch"),
        ({"x": None}, {"y": None}, "is a dict of 'y', and was a dict of 'x'"),
        ({"x": None}, UserDict(x=None), "is a UserDict of 'x', and was a dict of 'x'"),
        ({"x": torch.ones(3)}, {"x": torch.ones(2, 1)}, r"The output at `x` has rows of shape \(1,\)"),
    ],
)
def test_every_batch_is_read_as_the_first_one(first: Any, later: Any, message: str) -> None:
    restorer = Restorer(range(9), 3)
    restorer.add([0, 1, 2], first)
    with pytest.raises(ValueError, match=message):
        restorer.add([3, 4], later)


def test_a_list_of_outputs_stays_one_where_a_batch_is_as_long_as_it() -> None:
    step = lambda batch: [torch.tensor(batch), torch.tensor(batch) * 2]  # noqa: E731
    assert_equal(restored(range(5), [1, 5, 3, 2, 4], 3, step), [step([0, 1, 2]), step([3, 4])])


def test_samples_that_are_missing_or_too_many() -> None:
    restorer = Restorer([3, 4, 4], 2)
    restorer.add([4], torch.ones(1))
    with pytest.raises(ValueError, match=r"2 of 3 samples have no prediction, such as \[3, 4\]"):
        restorer.batches()
    restorer.add([4, 3], torch.ones(2))
    for again in (4, 9):
        with pytest.raises(ValueError, match=f"Sample {again} was predicted more often than it is in the stock order"):
            restorer.add([again], torch.ones(1))


def test_batches_of_other_sizes_than_announced() -> None:
    with pytest.raises(ValueError, match="A batch of 3 samples cannot be one of at most 2"):
        Restorer(range(9), 2).add([0, 1, 2], torch.ones(3))
    with pytest.raises(ValueError, match="A batch of 0 samples"):
        Restorer(range(9), 2).add([], torch.ones(0))
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        Restorer(range(9), 0)
