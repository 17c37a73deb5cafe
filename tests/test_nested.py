"""Nested collections are walked and copied, and never rebuilt where nothing changes."""

import sys
from array import array
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from lightning_hpu_infer.nested import map_tensors, size_of, tensors_in

X = torch.ones(2)


class Tagged(dict[str, Any]):
    """A dictionary with an attribute and a constructor that takes something else."""

    def __init__(self, tag: str, x: Tensor) -> None:
        super().__init__(x=x)
        self.tag = tag


class Listed(list[Any]):
    """Likewise a list."""

    def __init__(self, tag: str, x: Tensor) -> None:
        super().__init__([x])
        self.tag = tag


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    derived: str = field(init=False, default="derived")


Named = namedtuple("Named", "x y")
COLLECTIONS: list[Callable[[Tensor], Any]] = [
    lambda x: x,
    lambda x: [x, "a"],
    lambda x: (x, None),
    lambda x: Named(x, 1),
    lambda x: {"x": {"deep": [x]}},
    lambda x: OrderedDict(x=x),
    lambda x: defaultdict(int, x=x),
    lambda x: UserDict(x=x),
    lambda x: UserList([x]),
    lambda x: deque([x], maxlen=3),
    lambda x: MappingProxyType({"x": x}),
    lambda x: Tagged("tag", x),
    lambda x: Listed("tag", x),
    lambda x: Frozen(x),
    lambda x: BatchEncoding({"x": x}, n_sequences=1),
    lambda x: BaseModelOutput(last_hidden_state=x),
]


@pytest.mark.parametrize("make", COLLECTIONS, ids=lambda make: type(make(X)).__name__)
def test_tensors_are_replaced_in_a_copy_that_keeps_the_rest(make: Callable[[Tensor], Any]) -> None:
    data = make(X)
    doubled = map_tensors(lambda x: x * 2, data)
    assert type(doubled) is type(data)
    assert [tensor.tolist() for tensor in tensors_in(doubled)] == [[2.0, 2.0]]
    assert [tensor is X for tensor in tensors_in(data)] == [True]  # the given one is as before
    assert 8 <= size_of(data) == size_of(doubled) < 100
    attributes = {
        name: value for name, value in getattr(data, "__dict__", {}).items() if name in ("tag", "_n_sequences")
    }
    assert attributes.items() <= getattr(doubled, "__dict__", {}).items()
    assert getattr(doubled, "default_factory", None) is getattr(data, "default_factory", None)
    assert getattr(doubled, "maxlen", None) == getattr(data, "maxlen", None)


@pytest.mark.parametrize("make", COLLECTIONS, ids=lambda make: type(make(X)).__name__)
def test_a_collection_in_which_nothing_changes_is_itself(make: Callable[[Tensor], Any]) -> None:
    data = make(X)
    assert map_tensors(lambda x: x, data) is data


def test_what_is_unknown_stays_as_it_is() -> None:
    unknown = SimpleNamespace(x=X)
    data = [unknown, "text", range(3), {1, 2}, None, 1.5]
    assert list(tensors_in(data)) == []
    assert map_tensors(lambda x: x * 2, data) is data


def test_leaves_stay_as_they_are() -> None:
    packed = pack_padded_sequence(torch.ones(2, 3), torch.tensor([3, 2]), batch_first=True)
    assert map_tensors(lambda x: x * 2, [packed], leaf=lambda data: hasattr(data, "to"))[0] is packed


def test_a_part_that_was_never_set_is_passed_over() -> None:
    frozen = Frozen(X)
    object.__delattr__(frozen, "x")
    assert list(tensors_in(frozen)) == []


@dataclass
class Row:
    text: str
    scores: Any


TEXT, BLOCK = "x" * 10_000, np.zeros(10_000, np.uint8)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (BLOCK, 1),
        (BLOCK[:5_000], 0.5),
        (memoryview(bytes(10_000)), 1),
        (array("b", bytes(10_000)), 1),
        (TEXT, 1),
        (TEXT.encode(), 1),
        (bytearray(10_000), 1),
        ([TEXT, 1, 2.0, None], 1),
        ((TEXT, torch.zeros(10_000, dtype=torch.uint8)), 2),
        ({"a": [TEXT, {"b": BLOCK}]}, 2),
        ({"a", TEXT}, 1),
        (deque([TEXT, TEXT]), 2),
        (np.array([TEXT, BLOCK], object), 2),
        (Row(TEXT, [BLOCK, BLOCK]), 3),
        (object(), 0),
        (list(np.arange(1_250.0)), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_size_counts_all_that_holds_bytes(data: Any, count: float) -> None:
    assert size_of(data) == pytest.approx(10_000 * count, abs=800)


def test_the_size_of_very_many_numbers_is_found_without_a_call_for_each() -> None:
    calls = 0

    def called(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(called)
    try:
        size = size_of({"ids": list(range(100_000))})
    finally:
        sys.setprofile(None)
    assert size > 100_000 * 8
    assert calls < 20
