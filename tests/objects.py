"""Objects of many kinds that a loader or a step may fill again for each batch, and what a step reads of them."""

import copy
import weakref
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch


class Plain:
    """An object of the user's."""

    def __init__(self, names: Any = None) -> None:
        self.names = [""] if names is None else names

    @property
    def first(self) -> Any:
        return self.names[0]


class Slotted:
    __slots__ = ("__hidden", "names")

    def __init__(self) -> None:
        self.names, self.__hidden = [""], [""]

    def fill(self, name: str) -> None:
        self.names[0] = self.__hidden[0] = name

    def __repr__(self) -> str:
        return f"{self.names}{self.__hidden}"


class Pickled(Plain):
    """What is pickled of it is less than it has."""

    def __getstate__(self) -> Any:
        return {}

    def __reduce__(self) -> Any:
        raise TypeError("not pickled")


class ShallowCopy(Plain):
    def __copy__(self) -> "ShallowCopy":
        return ShallowCopy(list(self.names))


class DeepCopy(Plain):
    def __deepcopy__(self, memo: Any) -> "DeepCopy":
        return DeepCopy(list(self.names))


class DeepParts(Plain):
    """As `pydantic` makes them."""

    def __deepcopy__(self, memo: Any) -> "DeepParts":
        return DeepParts(copy.deepcopy(self.names, memo))


class NotDeep(Plain):
    def __deepcopy__(self, memo: Any) -> "NotDeep":
        raise TypeError("a lock, say")


class ClonesTensors(Plain):
    """Its `clone` has the tensors in mind."""

    def to(self, device: Any) -> "ClonesTensors":
        return self

    def clone(self) -> "ClonesTensors":
        return ClonesTensors(self.names)


class Asks(Plain):
    """Its method is an attribute, which another one has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = self.answer

    def answer(self) -> Any:
        return self.names[0]


class Child:
    def __init__(self, parent: "Parent") -> None:
        self.parent = weakref.ref(parent)


class Parent(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child(self)


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass
class Record:
    names: list[str] = field(default_factory=lambda: [""])

    def __post_init__(self) -> None:
        self.more = [""]


@dataclass(frozen=True)
class Frozen:
    names: list[str] = field(default_factory=lambda: [""])


class ListWithNames(list[Any]):
    names: list[str]


class DictWithNames(dict[str, Any]):
    names: list[str]


class Table(MutableMapping[str, Any]):
    """A mapping of the user's."""

    def __init__(self) -> None:
        self.items_: dict[str, Any] = {"a": [""]}

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


def with_names(data: Any) -> Any:
    data.names = [""]
    return data


def set_name(data: Any, name: str) -> object:
    data.names[0] = name
    return None


def rename(data: Any, name: str) -> None:
    data.names = [name]


def cells(kind: Any) -> Any:
    return kind([[""], None], dtype=object)


RECORDS = np.dtype([("n", int), ("inner", [("names", object)]), ("many", object, (2,))])


def records() -> Any:
    made = np.zeros(2, RECORDS)
    made["inner"]["names"][0] = [""]
    return made


# What makes an object, what the loader does to it for a batch, and what a step reads.
Case = tuple[Callable[[], Any], Callable[[Any, str], object], Callable[[Any], object]]
NAMES: tuple[Callable[[Any, str], object], Callable[[Any], object]] = set_name, lambda o: o.names[0]
CASES: dict[str, Case] = {
    "list in an object": (Plain, *NAMES),
    "attribute of an object": (Plain, rename, lambda o: o.names),
    "attribute of a namespace": (SimpleNamespace, lambda o, s: setattr(o, "n", s), lambda o: o.n),
    "property": (Plain, set_name, lambda o: o.first),
    "slots": (Slotted, lambda o, s: o.fill(s), repr),
    "lossy pickle": (Pickled, *NAMES),
    "__copy__": (ShallowCopy, *NAMES),
    "__copy__ of lists of lists": (
        lambda: ShallowCopy([[""]]),
        lambda o, s: o.names[0].__setitem__(0, s),
        lambda o: o.names[0][0],
    ),
    "__deepcopy__": (DeepCopy, *NAMES),
    "__deepcopy__ of parts": (DeepParts, *NAMES),
    "__deepcopy__ that fails": (NotDeep, *NAMES),
    "clone": (ClonesTensors, *NAMES),
    "bound method": (Asks, set_name, lambda o: o.ask()),
    "weak reference": (Parent, set_name, lambda o: o.child.parent().names[0]),
    "dataclass": (Record, lambda o, s: (set_name(o, s), o.more.__setitem__(0, s)), lambda o: (o.names[0], o.more[0])),
    "frozen dataclass": (Frozen, *NAMES),
    "named tuple": (lambda: Pair([""], SimpleNamespace()), lambda o, s: setattr(o.b, "n", s), lambda o: o.b.n),
    "list with an attribute": (lambda: with_names(ListWithNames([1])), *NAMES),
    "dict with an attribute": (lambda: with_names(DictWithNames(a=1)), *NAMES),
    "tensor with an attribute": (lambda: with_names(torch.zeros(1)), *NAMES),
    "object in a list in a dict": (
        lambda: {"a": [Plain()]},
        lambda o, s: set_name(o["a"][0], s),
        lambda o: o["a"][0].names[0],
    ),
    "defaultdict": (
        lambda: defaultdict(list, a=[""]),
        lambda o, s: o["a"].__setitem__(0, s),
        lambda o: (o["a"], o["b"]),
    ),
    "Counter": (Counter, lambda o, s: o.update([s]), dict),
    "OrderedDict": (
        lambda: OrderedDict(a=1, b=2),
        lambda o, s: (o.move_to_end("a"), o.update(b=s)),
        lambda o: list(o.items()),
    ),
    "UserDict": (lambda: UserDict(a=[""]), lambda o, s: o["a"].__setitem__(0, s), lambda o: o["a"][0]),
    "UserList": (lambda: UserList([[""]]), lambda o, s: o[0].__setitem__(0, s), lambda o: o[0][0]),
    "ChainMap": (lambda: ChainMap({"b": 1}, {"a": [""]}), lambda o, s: o["a"].__setitem__(0, s), lambda o: o["a"][0]),
    "mapping of the user's": (Table, lambda o, s: o["a"].__setitem__(0, s), lambda o: o["a"][0]),
    "deque": (lambda: deque([[""]], 3), lambda o, s: o[0].__setitem__(0, s), lambda o: (o.maxlen, o[0][0])),
    "set of objects": (lambda: {Plain()}, lambda o, s: set_name(next(iter(o)), s), lambda o: next(iter(o)).names[0]),
    "frozenset of objects": (
        lambda: frozenset([Plain()]),
        lambda o, s: set_name(next(iter(o)), s),
        lambda o: next(iter(o)).names[0],
    ),
    "objects as keys": (
        lambda: (lambda key: {"key": key, "of": {key: 1}})(Plain()),
        lambda o, s: set_name(o["key"], s),
        lambda o: (o["key"].names[0], o["of"][o["key"]]),
    ),
    "records of NumPy": (records, lambda o, s: o["inner"]["names"][0].__setitem__(0, s), lambda o: str(o)),
    "objects of NumPy": (lambda: cells(np.array), lambda o, s: o.flat[0].__setitem__(0, s), str),
    "object of NumPy": (
        lambda: np.array(Plain(), dtype=object),
        lambda o, s: set_name(o.item(), s),
        lambda o: o.item().names[0],
    ),
    "column of pandas": (lambda: cells(pd.Series), lambda o, s: o[0].__setitem__(0, s), lambda o: str(o[0])),
    "table of pandas": (
        lambda: pd.DataFrame({"n": [1, 2], "a": cells(pd.Series), "s": ["x", "y"], "b": [Plain(), Plain()]}),
        lambda o, s: (o["a"][0].__setitem__(0, s), set_name(o["b"][1], s)),
        lambda o: (o["a"][0][0], o["b"][1].names[0], o["s"].tolist(), [str(dtype) for dtype in o.dtypes]),
    ),
    "bytearray": (lambda: bytearray(1), lambda o, s: o.extend(s.encode()), bytes),
    "array.array": (lambda: array("i"), lambda o, s: o.append(int(s)), list),
    "memoryview": (lambda: memoryview(array("i", [0, 0])), lambda o, s: o.__setitem__(0, int(s)), list),
}


def batches_of(cases: dict[str, Case]) -> Iterator[Any]:
    """One object that holds one of each kind, and says of which batch it is in all of them."""
    held = SimpleNamespace(**{name: make() for name, (make, _, _) in cases.items()})
    for number in range(6):
        for name, (_, change, _) in cases.items():
            change(getattr(held, name), str(number))
        yield held


def read(cases: dict[str, Case], held: Any) -> dict[str, str]:
    return {name: str(see(getattr(held, name))) for name, (_, _, see) in cases.items()}


TRUTH = [read(CASES, held) for held in batches_of(CASES)]
