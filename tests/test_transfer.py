from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BatchEncoding

from lightning_hpu_infer import emulator
from lightning_hpu_infer.transfer import pin
from tests.helpers import assert_equal

HPU = torch.device("hpu", 0)
pytestmark = pytest.mark.usefixtures("emulated")


def pinned(tensor: Tensor) -> bool:
    return tensor.is_pinned("hpu")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(12.0)[::2],
        torch.ones(3, dtype=torch.int32),
        torch.ones(3, dtype=torch.bool),
        torch.ones((), dtype=torch.bfloat16),
        torch.ones(1, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.stride())}",
)
def test_a_tensor_is_copied_to_pinned_memory_unchanged(tensor: Tensor) -> None:
    copied = pin(tensor)
    assert pinned(copied)
    assert copied.data_ptr() != tensor.data_ptr()
    assert_equal(copied, tensor)
    assert_equal(copied.to(HPU, non_blocking=True).cpu(), tensor)


@pytest.mark.parametrize(
    "tensor", [torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.float64), torch.empty(0)], ids=str
)
def test_what_the_bridge_would_not_read_from_pinned_memory_stays(tensor: Tensor) -> None:
    assert pin(tensor) is tensor


class Own(Tensor):
    """A tensor of a class of the user's own."""


NOT_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "sparse rows": Tensor.to_sparse_csr,
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "MKLDNN": Tensor.to_mkldnn,
    "meta": lambda x: x.to("meta"),
    "fake": FakeTensorMode().from_tensor,
    "on the device": lambda x: x.to(HPU),
    "own class": lambda x: x.as_subclass(Own),
}


@pytest.mark.filterwarnings("ignore:.*(quantize_per_tensor|Sparse CSR|nested tensors|NJT)")
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_tensors_that_are_not_plain_stay(kind: str) -> None:
    tensor = NOT_PLAIN[kind](torch.eye(3))
    assert pin([tensor])[0] is tensor


def test_memory_that_is_pinned_already_is_copied_if_it_may_be_filled_again() -> None:
    buffer = torch.ones(3).pin_memory("hpu")
    assert pin(buffer) is buffer
    copied = pin(buffer, owns=True)
    buffer.fill_(2)
    assert pinned(copied)
    assert_equal(copied, torch.ones(3))


def test_what_is_pinned_is_copied_once() -> None:
    """The copy to pinned memory is the copy that nobody else writes to."""
    batch = {"x": torch.ones(3), "ids": torch.ones(3, dtype=torch.int64)}
    copied = pin(batch, owns=True)
    assert pinned(copied["x"])
    assert not pinned(copied["ids"])
    assert copied["ids"] is not batch["ids"]


def test_in_eager_mode_64_bit_tensors_are_pinned_too() -> None:
    emulator.uninstall()
    emulator.install(emulator.EmulatorConfig(lazy=False))
    assert pinned(pin(torch.ones(3, dtype=torch.int64)))


class Pair(NamedTuple):
    x: Tensor
    name: str


@dataclass
class Record:
    x: Tensor
    name: str


def test_collections_keep_their_type_and_what_is_not_a_tensor() -> None:
    x = torch.ones(2)
    batch = {"pair": Pair(x, "a"), "record": Record(x, "b"), "list": [x, 1, None], "encoding": BatchEncoding({"x": x})}
    copied = pin(batch)
    assert type(copied["pair"]) is Pair
    assert type(copied["record"]) is Record
    assert (copied["pair"].name, copied["record"].name, copied["list"][1:]) == ("a", "b", [1, None])
    assert isinstance(copied["encoding"], UserDict)
    assert type(copied["encoding"]) is BatchEncoding
    found = (copied["pair"].x, copied["record"].x, copied["list"][0], copied["encoding"]["x"])
    assert [pinned(tensor) for tensor in found] == [True] * 4


def test_rule_8_a_pinned_buffer_is_not_reused_before_its_copy_is_done() -> None:
    tensors = [torch.full((1000,), float(i)) for i in range(20)]
    with emulator.paused("h2d"):
        # All copies are issued, none has run; each buffer is dropped by us at once.
        copies = [pin(tensor).to(HPU, non_blocking=True) for tensor in tensors]
    assert_equal([copy.cpu() for copy in copies], tensors)
