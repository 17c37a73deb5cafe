"""A batch that is owned stays as it is, whatever happens to the one that it was made from."""

from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from lightning_hpu_infer.ownership import copy_of, may_reuse_memory, owned
from tests.helpers import Rows


def test_what_occurs_twice_is_one_object_in_the_copy_too() -> None:
    x, names = torch.ones(2), ["a"]
    batch = owned({"x": x, "same": [x], "names": names, "again": names})
    assert batch["x"] is batch["same"][0]
    assert batch["names"] is batch["again"]
    assert batch["x"] is not x
    assert batch["names"] is not names


class Moved:
    """An object that moves to the device by itself, and cannot clone itself."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"Moved({self.inner})"

    def to(self, device: Any) -> "Moved":
        return Moved(SimpleNamespace(x=self.inner.x.to(device)))


MEMORY: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "tensor": (torch.zeros(2), lambda x: x.fill_(1)),
    "array": (np.zeros(2), lambda x: x.fill(1)),
    "structured array": (np.rec.array([(0, 0.0)], dtype=[("a", int), ("b", float)]), lambda x: x.a.fill(1)),
    "bytearray": (bytearray(2), lambda x: x.extend(b"1")),
    "array.array": (array("i", [0]), lambda x: x.append(1)),
    "set": ({0}, lambda x: x.add(1)),
    "list": ([0], lambda x: x.append(1)),
    "dict": ({"a": 0}, lambda x: x.update(a=1)),
    "array in a list in an object": (SimpleNamespace(many=[np.zeros(2)]), lambda x: x.many[0].fill(1)),
    "array of objects": (np.array([np.zeros(2), None], dtype=object), lambda x: x[0].fill(1)),
    "table": (pd.DataFrame({"a": [0.0]}), lambda x: x.__setitem__("a", [1.0])),
    "object in an object": (SimpleNamespace(sample=SimpleNamespace(x=torch.zeros(2))), lambda x: x.sample.x.fill_(1)),
    "array in an object in lists in objects": (
        SimpleNamespace(many=[SimpleNamespace(x=[np.zeros(2)])]),
        lambda x: x.many[0].x[0].fill(1),
    ),
    "tensor in an object that is moved": (Moved(SimpleNamespace(x=torch.zeros(2))), lambda x: x.inner.x.fill_(1)),
    "attribute of an object": (SimpleNamespace(x=torch.zeros(2), n=0), lambda x: x.x.fill_(1)),
}


@pytest.mark.parametrize("memory", MEMORY)
def test_memory_of_every_kind_is_copied(memory: str) -> None:
    data, write = MEMORY[memory]
    copied = owned({"deep": [data]})["deep"][0]
    before = repr(data)
    write(data)
    assert repr(data) != before
    assert repr(copied) == before
    assert type(copied) is type(data)


def test_what_refers_to_itself_is_copied_as_it_is() -> None:
    node = SimpleNamespace(x=torch.zeros(2))
    node.again, node.child = [node], SimpleNamespace(parent=node)
    copied = owned(node)
    assert copied is not node
    assert copied.again[0] is copied
    assert copied.child.parent is copied
    loop: list[Any] = [1]
    loop.append((loop, {"loop": loop}))
    copied = owned(loop)
    assert copied is not loop
    assert copied[1][0] is copied[1][1]["loop"] is copied
    node = chain = SimpleNamespace(next=None)
    for _ in range(5_000):
        node.next = node = SimpleNamespace(next=None)
    copied, length = owned(chain), 0
    while copied is not None:
        assert copied is not chain
        copied, chain, length = copied.next, chain.next, length + 1
    assert length == 5_001


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_copy_of_a_tensor_differs_in_nothing_but_its_memory(inference: bool, requires_grad: bool) -> None:
    with torch.inference_mode(inference):
        x = torch.ones(2, 3).t().requires_grad_(requires_grad)
    x.note = "note"  # type: ignore[attr-defined]
    with torch.inference_mode():  # as the prefetch thread
        copied: Any = copy_of(x)
    assert copied.is_inference() == inference
    assert (copied.requires_grad, copied.is_leaf, copied.stride(), copied.note) == (requires_grad, True, (1, 3), "note")
    assert copied.data_ptr() != x.data_ptr()


@pytest.mark.usefixtures("emulated")
def test_rule_2_tensors_of_the_device_are_left_to_the_main_thread() -> None:
    x = torch.ones(2, device="hpu")
    assert owned([x])[0] is x


class Closes:
    """An object that gives something back when it goes: a copy would do so too."""

    def __init__(self) -> None:
        self.x = torch.ones(2)

    def __del__(self) -> None:
        pass


class One:
    """An object of which there is one."""

    def __init__(self) -> None:
        self.x = torch.ones(2)

    def __copy__(self) -> "One":
        return self


class Uncopied(One):
    def __copy__(self) -> "One":
        raise RuntimeError("not copied")


def function() -> None:
    """With an attribute, which a function may have."""


function.x = torch.ones(2)  # type: ignore[attr-defined]
LEFT = [
    *(Closes(), One(), Uncopied(), function, SimpleNamespace()),
    *(nn.Linear(2, 2), Rows(2), DataLoader(Rows(2)), Tensor),
]


@pytest.mark.parametrize("thing", LEFT, ids=lambda thing: getattr(thing, "__name__", type(thing).__name__))
def test_what_cannot_be_copied_and_what_nobody_refills_is_left_alone(thing: Any) -> None:
    x = getattr(thing, "x", None)
    assert owned([thing])[0] is thing
    assert getattr(thing, "x", None) is x


class Graph:
    """A batch object of a graph library, whose memory is deeper than we look."""

    def __init__(self, x: Tensor) -> None:
        self.store = SimpleNamespace(x=x)

    def to(self, device: Any) -> "Graph":
        return Graph(self.store.x.to(device))

    def clone(self) -> "Graph":
        return Graph(self.store.x.clone())


@pytest.mark.parametrize("make", [lambda graph: graph, lambda graph: SimpleNamespace(graph=graph).graph])
def test_objects_that_can_clone_themselves_do(make: Callable[[Graph], Graph]) -> None:
    graph = make(Graph(torch.zeros(2)))
    copied = owned(graph)
    graph.store.x.fill_(1)
    assert copied.store.x.tolist() == [0, 0]


class Overridden(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


LOADERS: list[tuple[Any, bool]] = [
    (DataLoader(Rows(2)), False),
    (DataLoader(Rows(2), batch_size=None, collate_fn=default_collate), False),
    (DataLoader(Rows(2), num_workers=1, collate_fn=list), False),
    ([torch.ones(2)], False),
    (DataLoader(Rows(2), collate_fn=lambda samples: default_collate(samples)), True),
    (DataLoader(Rows(2), batch_size=None), True),
    (Overridden(Rows(2)), True),
    (Overridden(Rows(2), num_workers=1), True),
    (iter([torch.ones(2)]), True),
]


@pytest.mark.parametrize("number", range(len(LOADERS)))
def test_whose_memory_may_be_filled_again(number: int) -> None:
    loader, may = LOADERS[number]
    assert may_reuse_memory(loader) == may


@pytest.mark.parametrize("samples", [[np.zeros(2)], [torch.zeros(2)], [{"a": np.zeros(2)}], [(np.zeros(2), "text")]])
def test_default_collate_makes_new_memory_of_a_single_sample_too(samples: list[Any]) -> None:
    """What `may_reuse_memory` relies on."""
    sample = samples[0]
    memory = sample["a"] if isinstance(sample, dict) else sample[0] if isinstance(sample, tuple) else sample
    collated = default_collate(samples)
    made = collated["a"] if isinstance(sample, dict) else collated[0] if isinstance(sample, tuple) else collated
    memory[:] = 1
    assert made.tolist() == [[0, 0]]
