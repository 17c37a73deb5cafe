"""Objects that a loader or a step uses again are copied with all that is in them, in whatever it may be."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer.nested import map_tensors
from lightning_hpu_infer.ownership import owned
from tests.helpers import Rows, trainer
from tests.objects import CASES, DeepParts, Pair, Plain, Table


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("holder", [lambda data: [data], Plain], ids=["in a list", "in an object"])
def test_what_an_object_holds_is_copied(name: str, holder: Callable[[Any], Any]) -> None:
    make, change, see = CASES[name]
    data = [make()]
    change(data[0], "1")
    before, kept = str(see(data[0])), owned(holder(data))
    copied = (kept.names if isinstance(kept, Plain) else kept[0])[0]
    assert type(copied) is type(data[0])
    assert str(see(copied)) == before
    change(data[0], "2")
    assert str(see(data[0])) != before
    if "weak" in name:
        gc.collect()  # which takes a second in a process with many modules
    assert str(see(copied)) == before


def test_one_object_stays_one_wherever_it_is_met() -> None:
    plain, x = Plain(), torch.zeros(1)
    plain.x, plain.itself = x, plain  # type: ignore[attr-defined]
    holder = SimpleNamespace(plain=plain, pair=(plain, [plain]), of={plain: plain}, frame=pd.Series([plain]))
    batch = {"holder": holder, "plain": plain, "deep": [DeepParts([plain])], "x": x}
    for copied in (owned(batch), owned(batch, Tensor.clone, torch.clone)):
        one = copied["plain"]
        assert one is not plain
        found = copied["holder"]
        (key,) = found.of
        others = [one.itself, found.plain, found.pair[0], found.pair[1][0], key, found.of[key], found.frame[0]]
        assert all(other is one for other in [*others, copied["deep"][0].names[0]])
        assert isinstance(found, SimpleNamespace)
    copied = owned(batch)
    assert copied["x"] is copied["plain"].x is not x


class OfUser(logging.Handler):
    """Of a class that is no data."""


class Follower(Callback):
    pass


class Reader:
    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> int:
        return 1


@dataclass(frozen=True)
class Point:
    """A value."""

    x: int = 1


def shared(path: Path) -> Iterator[Any]:
    yield from (threading.Lock(), threading.Event(), threading.local(), logging.getLogger("x"), OfUser(), Follower())
    yield from (nn.Linear(1, 1), Rows(2), DataLoader(Rows(2)), torch.Generator(), np.random.default_rng(), Reader())
    yield from (torch.optim.SGD(nn.Linear(1, 1).parameters()), trainer("cpu"), iter([1]), (i for i in [1]), Plain)
    yield from (weakref.WeakValueDictionary(a=Plain), path, Point(), Pair(1, ("a", b"b")), frozenset([1]), range(2))
    yield from (torch.float32, torch.device("cpu"), torch.Size([1]), np.float32(1), pd.Timestamp(0), slice(2), len)


def test_what_is_shared_on_purpose_and_values_stay_the_objects_that_they_are(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        for thing in [*shared(tmp_path), file]:
            holder = Plain([thing])
            holder.thing = thing  # type: ignore[attr-defined]
            copied: Any = owned([holder, thing])
            assert copied[0] is not holder
            assert copied[1] is copied[0].thing is copied[0].names[0] is thing


def test_what_cannot_be_copied_ends_nothing_and_stays_as_it_is() -> None:
    class Fails(Plain):
        def __copy__(self) -> Any:
            raise RuntimeError("never")

        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("never")

    class Sealed(dict[str, Any]):
        def __setitem__(self, *_: Any) -> None:
            raise RuntimeError("sealed")

        def __reduce_ex__(self, _: Any) -> Any:
            raise RuntimeError("never")

    class Computes(Table):
        def __getitem__(self, key: str) -> Any:
            raise RuntimeError("never")

    for thing in (Fails(), Sealed(a=[1])):
        assert owned([thing])[0] is thing
        assert thing == thing
    computes = Computes()
    assert owned([computes])[0] is computes
    assert owned(SimpleNamespace(inner=computes)).inner is not computes


def test_a_mapping_of_the_users_is_not_written_to() -> None:
    table = Table()
    table["x"] = torch.ones(1)
    assert map_tensors(lambda x: x * 2, table)["x"] == 2
    assert owned(table)["x"] is not table["x"]
    assert table["x"] == 1


def test_classes_of_installed_packages_that_say_that_they_are_data_are_copied() -> None:
    made = type("Made", (), {"__module__": "numpy", "__attrs_attrs__": ()})()
    other = type("Other", (), {"__module__": "numpy"})()
    made.names, other.names = ["a"], ["a"]
    copied = owned([made, other])
    assert copied[0].names is not made.names
    assert copied[1] is other
    other.x = torch.ones(1)
    assert owned([other])[0].names is not other.names


def test_an_iterator_is_copied_with_its_memory_only() -> None:
    reader = Reader()
    assert owned([reader])[0] is reader
    reader.x = torch.ones(1)
    assert owned([reader])[0].x is not reader.x
