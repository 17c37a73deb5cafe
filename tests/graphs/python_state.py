# mypy: ignore-errors
# ruff: noqa: B005, B006, B007, B008, B010, B019, B023, B031, B035, B039, B905, C400, C416, C417, C419, E501, PLW0603, RUF005, RUF015, RUF100, SIM, UP, PLR, PERF, PYI
"""Steps that compute and keep ordinary Python values: `STEPS`."""

import collections
import copy
import dataclasses
import functools
import itertools
import json
import math
import operator
import pathlib
import re
import types
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

Compute = Callable[["Keeping", Tensor, int], Any]
"""What a step does beside its network: `m` is the module, `y` the network's output, `i` the number of the batch."""


class Step(NamedTuple):
    make: Callable[[], Any]
    """The value of the module's attribute `s` before the run."""
    compute: Compute


STEPS: dict[str, Step] = {}


class Keeping(LightningModule):
    """Returns what its network gives, and what else its step computes; keeps things in `s`."""

    total: int = 0

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(4, 3)
        GLOBALS.clear()
        Keeping.total = 0
        Shared.count = 0
        self.s, self.compute = step.make(), step.compute

    def predict_step(self, batch: Tensor, batch_idx: int) -> Any:
        y = self.net(batch)
        return y, self.compute(self, y, batch_idx)

    def double(self, x: Any) -> Any:
        return x * 2


GLOBALS: dict[str, Any] = {}


class Shared:
    count = 0


def add(name: str, make: Callable[[], Any], compute: Compute) -> None:
    assert name not in STEPS
    STEPS[name] = Step(make, compute)


def nothing() -> None:
    return None


def keeps(name: str, make: Callable[[], Any]) -> Callable[[Compute], Compute]:
    def decorate(compute: Compute) -> Compute:
        add(name, make, compute)
        return compute

    return decorate


# Text

for each in ("d", "04d", "03d", "x", ".2f", ">6", "+d", "e", ",d", "b"):
    add(f"f-string {each}", nothing, lambda m, y, i, each=each: f"{i:{each}}")
    add(f"format {each}", nothing, lambda m, y, i, each=each: format(i, each))
add("f-string 04d literal", nothing, lambda m, y, i: f"{i:04d}")
add("f-string plain", nothing, lambda m, y, i: f"{i}")
add("f-string s", nothing, lambda m, y, i: f"{i!s}")
add("f-string r", nothing, lambda m, y, i: f"{i!r}")
add("f-string s with a width", nothing, lambda m, y, i: (f"{i!s:5}|", f"{i!r:5}", f"{i!a:>4}"))
add("f-string with a width", nothing, lambda m, y, i: (f"{i:5}|", f"{i:5}"))
add("f-string =", nothing, lambda m, y, i: f"{i=}")
add("f-string in a list", nothing, lambda m, y, i: [f"{i:03d}", i])
add("f-string compared", nothing, lambda m, y, i: (f"{i:03d}" == "003", f"{i:03d}" in {"001", "002"}))
add("f-string method", nothing, lambda m, y, i: f"{i}".rjust(4, "0"))
add("f-string prefix", nothing, lambda m, y, i: f"img_{i:03d}.png")
add("f-string suffix", nothing, lambda m, y, i: f"{i:02d}" + ".png")
add("f-string of a sum", nothing, lambda m, y, i: f"{i * 2 + 1:03d}")
add("f-string of a quotient", nothing, lambda m, y, i: f"{i / 3:.3f}")
add("f-string of a size", nothing, lambda m, y, i: f"{y.shape} {y.shape[0]:03d} {y.dtype} {y.numel() * i}")
add("f-string of a float", lambda: [0.5], lambda m, y, i: (m.s.append(m.s[-1] * 1.5), f"{m.s[-1]:.3f}")[1])
add("f-string nested", nothing, lambda m, y, i: f"{f'{i:03d}':>6}")
add("f-string as a key", dict, lambda m, y, i: m.s.update({f"{i:03d}": i}))
add("f-string as a key again", dict, lambda m, y, i: (m.s.setdefault(f"k{i % 2}", []).append(i), len(m.s)))
add("f-string as a key of counts", collections.Counter, lambda m, y, i: (m.s.update([f"k{i % 2}"]), m.s[f"k{i % 2}"]))
add("f-string as a key of lists", lambda: collections.defaultdict(list), lambda m, y, i: (
    m.s[f"{i % 2:02d}"].append(i), len(m.s)))  # fmt: skip
add("f-string as a key that is got", lambda: {"k0": 1, "k1": 2}, lambda m, y, i: (
    m.s.get(f"k{i % 3}"), f"k{i % 3}" in m.s, m.s.pop(f"k{i - 2}", None)))  # fmt: skip
add("f-string in a set", set, lambda m, y, i: (m.s.add(f"k{i % 2}"), len(m.s)))
add("f-string in a list kept", list, lambda m, y, i: (f"k{i % 2}" in m.s, m.s.append(f"k{i % 2}"), m.s.count("k1")))
add("f-string found in a list", lambda: ["k1", "k0"], lambda m, y, i: m.s.index(f"k{i % 2}"))
add(
    "f-string compared with others",
    lambda: ["k0"],
    lambda m, y, i: (f"k{i}" == m.s[0], f"k{i}" != "k1", f"k{i}" < "k2"),
)
add("f-string of an attribute", lambda: types.SimpleNamespace(k0=1, k1=2), lambda m, y, i: (
    setattr(m.s, f"n{i % 2}", i), getattr(m.s, f"k{i % 2}"), hasattr(m.s, f"n{i}")))  # fmt: skip
add("f-string taken apart", nothing, lambda m, y, i: (
    f"k{i}"[1:], f"k{i}".startswith("k1"), "1" in f"k{i}", int(f"{i}1"), len(f"{i * 50}"), f"{i},{i}".split(",")))  # fmt: skip
add("f-string sorted", nothing, lambda m, y, i: (sorted([f"{9 - i}", "5"]), max(f"{i}", "2"), "-".join([f"{i}", "a"])))
add("f-string hashed", nothing, lambda m, y, i: (hash(f"k{i}") == hash(f"k{i:d}"), {f"k{j}": j for j in range(i)}))
add(
    "f-string that decides",
    nothing,
    lambda m, y, i: "first" if f"k{i}" == "k0" else y * 2 if f"{i}" in ("2", "4") else y,
)
add("f-string kept", list, lambda m, y, i: m.s.append(f"{i:03d}"))
add("format of a float", lambda: types.SimpleNamespace(t=0.25), lambda m, y, i: (
    setattr(m.s, "t", m.s.t * 2), format(m.s.t, ".3f"))[1])  # fmt: skip
add("format without a spec", nothing, lambda m, y, i: format(i))
add("format of text", nothing, lambda m, y, i: format(str(i), ">5"))
add("format of a tensor's size", nothing, lambda m, y, i: format(y.shape[0] * i, "03d"))
add("str", nothing, lambda m, y, i: str(i))
add("repr", nothing, lambda m, y, i: repr(i))
add("hex", nothing, lambda m, y, i: (hex(i), oct(i), bin(i), chr(65 + i)))
add("percent", lambda: "%03d of %s", lambda m, y, i: m.s % (i, "ten"))
add("str.format", lambda: "{:03d} {name}", lambda m, y, i: m.s.format(i, name=i))
add("format_map", nothing, lambda m, y, i: "{i:03d}".format_map({"i": i}))
add("str methods", nothing, lambda m, y, i: ("a,b" + str(i)).upper().split(",") + [str(i).zfill(3)])
add("join", nothing, lambda m, y, i: "-".join(str(k) for k in range(i)))
add("slices of text", nothing, lambda m, y, i: "abcdefgh"[i : i + 2])
add("text repeated", nothing, lambda m, y, i: "ab" * i)
add("text in", nothing, lambda m, y, i: str(i) in "0235")
add("startswith", nothing, lambda m, y, i: str(i * 7).startswith("1"))
add("bytes", nothing, lambda m, y, i: str(i).encode() + bytes([i]))
add("re", nothing, lambda m, y, i: re.sub(r"\d", "#", f"a{i}b") + str(bool(re.match(r"[0-2]", str(i)))))
add("json", nothing, lambda m, y, i: json.dumps({"i": i, "rows": y.shape[0]}))
add("path", nothing, lambda m, y, i: str(pathlib.Path("a") / f"{i:03d}.png"))
add("path suffix", nothing, lambda m, y, i: pathlib.PurePath(f"{i}.png").with_suffix(".txt").name)
add("template", lambda: "{}-{:>3}", lambda m, y, i: m.s.format(i, i))

# Numbers


def numbers(m: Keeping, y: Tensor, i: int) -> Any:
    return (
        int(i / 2),
        float(i),
        round(i / 3, 2),
        divmod(i, 2),
        i**2,
        abs(-i),
        bool(i % 2),
        i // 2,
        -i % 3,
        i & 1,
        i << 1,
    )


add("numbers", nothing, numbers)
add("math", nothing, lambda m, y, i: (math.sqrt(i), math.ceil(i / 2), math.floor(i / 2), math.gcd(i, 4), math.pi * i))
add("math of a kept float", lambda: [1.0], lambda m, y, i: (m.s.append(math.sin(m.s[-1])), y * m.s[-1])[1])
add("decimal", nothing, lambda m, y, i: Decimal(i) / 4)
add("fraction", nothing, lambda m, y, i: Fraction(i, 4))
add("complex", nothing, lambda m, y, i: complex(i, 1) * 2)
add("min and max", nothing, lambda m, y, i: (min(i, 3), max(i, 3), sum([i, 1]), sum(range(i))))
add("int of text", nothing, lambda m, y, i: int(str(i) + "1") + int("0b1", 2))
add(
    "sizes",
    nothing,
    lambda m, y, i: (y.shape, y.size(0) * i, int(y.shape[1]), float(y.shape[0]), y.dim(), tuple(y.shape)),
)
add("bool or", nothing, lambda m, y, i: (i or "none", i and "some", not i))
add("chained comparison", nothing, lambda m, y, i: 1 < i < 4)
add("conditional", nothing, lambda m, y, i: "even" if i % 2 == 0 else "odd")
add("is", nothing, lambda m, y, i: ((None if i < 2 else i) is None, type(i) is int, isinstance(i, int)))
add("type name", nothing, lambda m, y, i: (type(i).__name__, type(i / 2).__name__, type(y.shape[0]).__name__))
add("hash", nothing, lambda m, y, i: (hash(i), hash((i, 1))))
add("walrus", nothing, lambda m, y, i: (k := i * 2) + k)
add("tensor by a number", nothing, lambda m, y, i: (y * i, y + i / 2, torch.full((2,), i), torch.tensor(i)))
add("tensor row", nothing, lambda m, y, i: (y[i % 2], y[:, : i % 3 + 1], y.narrow(1, i % 2, 1)))
add("tensor by name", nothing, lambda m, y, i: getattr(y, ["sum", "mean", "amax"][i % 3])())

# Lists, tuples, dictionaries, sets

add("list", list, lambda m, y, i: (m.s.append(i), len(m.s))[1])
add("list of tensors", list, lambda m, y, i: (m.s.append(y), torch.stack(m.s[-3:]).mean(0))[1])
add("list insert and pop", lambda: [9, 8], lambda m, y, i: (m.s.insert(0, i), m.s.pop(), list(m.s))[1:])
add("list slices", lambda: [0] * 4, lambda m, y, i: (m.s.__setitem__(slice(0, 1), [i, i]), m.s[::2], m.s[-2:])[1:])
add("list sort", lambda: [5, 3], lambda m, y, i: (m.s.append(i), m.s.sort(), m.s.reverse(), list(m.s))[3])
add("list sort by key", lambda: ["bb"], lambda m, y, i: (m.s.append("a" * i), m.s.sort(key=len), list(m.s))[2])
add("list remove", lambda: list(range(9)), lambda m, y, i: (m.s.remove(i), m.s.index(8), m.s.count(i)))
add("list clear", list, lambda m, y, i: (m.s.extend([i, i]), m.s.clear() if i == 3 else None, len(m.s))[2])
add("list in place", list, lambda m, y, i: (operator.iadd(m.s, [i]), len(m.s))[1])
add("tuple of lists", lambda: ([], []), lambda m, y, i: (m.s[i % 2].append(i), len(m.s[0]) + len(m.s[1]))[1])
add("tuple of lists, filled", lambda: ([1], [2]), lambda m, y, i: (m.s[i % 2].append(i), sum(m.s[0]))[1])
add("tuple of tensors' lists", lambda: ([],), lambda m, y, i: (m.s[0].append(y), torch.stack(m.s[0]).sum(0))[1])
add("tuple of tuples of lists", lambda: ((([],),),), lambda m, y, i: (m.s[0][0][0].append(i), len(m.s[0][0][0]))[1])
add("tuple of sets", lambda: (set(),), lambda m, y, i: (m.s[0].add(i % 4), len(m.s[0]))[1])
add("tuple of sets, filled", lambda: ({7},), lambda m, y, i: (m.s[0].add(i % 4), sorted(m.s[0]))[1])
add("tuple of dicts", lambda: ({}, {}), lambda m, y, i: (m.s[i % 2].update({i: i}), len(m.s[0]))[1])
add("tuple of deques", lambda: (collections.deque(maxlen=2),), lambda m, y, i: (m.s[0].append(i), list(m.s[0]))[1])
add("tuple of bytearrays", lambda: (bytearray(),), lambda m, y, i: (m.s[0].append(i), bytes(m.s[0]))[1])
add("tuple in a list", lambda: [([],)], lambda m, y, i: (m.s[0][0].append(i), len(m.s[0][0]))[1])
add("tuple in a dict", lambda: {"a": ([], [])}, lambda m, y, i: (m.s["a"][0].append(i), len(m.s["a"][0]))[1])
add("tuple in a namespace", lambda: types.SimpleNamespace(a=([],)), lambda m, y, i: (
    m.s.a[0].append(i), len(m.s.a[0]))[1])  # fmt: skip


@keeps("tuple unpacked", lambda: ([0], [0]))
def _(m: Keeping, y: Tensor, i: int) -> Any:
    a, c = m.s
    a.append(i)
    c[0] += 1
    return y * (len(a) + c[0])


@keeps("tuple in a loop", lambda: ([], []))
def _(m: Keeping, y: Tensor, i: int) -> Any:
    for each in m.s:
        each.append(i)
    return len(m.s[0])


@keeps("tuple of one's own", lambda: ([], []))
def _(m: Keeping, y: Tensor, i: int) -> Any:
    for each in (m.s[0], m.s[1]):
        each.append(i)
    return [list(each) for each in m.s]


@keeps("tuple passed on", lambda: ([], []))
def _(m: Keeping, y: Tensor, i: int) -> Any:
    def record(*lists: Any, into: int) -> int:
        lists[into].append(i)
        return len(lists[into])

    return record(*m.s, into=i % 2)


@keeps("tuple read around a break", lambda: ([], []))
def _(m: Keeping, y: Tensor, i: int) -> Any:
    first, _ = m.s
    shift = int(y.sum().item())
    first.append(i)
    return shift, len(m.s[0])


class Pair(NamedTuple):
    left: list[Any]
    right: Any


@dataclasses.dataclass
class Record:
    items: list[Any] = dataclasses.field(default_factory=list)
    pair: tuple[list[int], ...] = ()
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    items: list[Any]
    pair: tuple[list[int], ...] = ()
    count: int = 0


class Slots:
    __slots__ = ("count", "items", "pair")

    def __init__(self) -> None:
        self.count, self.items, self.pair = 0, [], ([],)


add("namedtuple of lists", lambda: Pair([], []), lambda m, y, i: (m.s.left.append(i), len(m.s.left), m.s[0][-1])[1:])
add("namedtuple replaced", lambda: Pair([], 0), lambda m, y, i: (setattr(m, "s", m.s._replace(right=i)), m.s.right)[1])
add("collections.namedtuple", lambda: collections.namedtuple("N", "a b")([], 1), lambda m, y, i: (
    m.s.a.append(i), m.s._asdict(), len(m.s.a))[2])  # fmt: skip
add("dataclass", Record, lambda m, y, i: (m.s.items.append(i), setattr(m.s, "count", i), len(m.s.items), m.s.count)[2:])
add("dataclass with a tuple", lambda: Record(pair=([], [])), lambda m, y, i: (
    m.s.pair[0].append(i), len(m.s.pair[0]))[1])  # fmt: skip
add("dataclass replaced", Record, lambda m, y, i: (setattr(m, "s", dataclasses.replace(m.s, count=i)), m.s.count)[1])
add("dataclass as dict", Record, lambda m, y, i: (setattr(m.s, "count", i), dataclasses.asdict(m.s))[1])
add("frozen dataclass", lambda: Frozen([], ([],)), lambda m, y, i: (
    m.s.items.append(i), m.s.pair[0].append(i), len(m.s.items) + len(m.s.pair[0]))[2])  # fmt: skip
add("frozen replaced", lambda: Frozen([]), lambda m, y, i: (
    setattr(m, "s", dataclasses.replace(m.s, count=m.s.count + i)), m.s.count)[1])  # fmt: skip
add("slots", Slots, lambda m, y, i: (m.s.items.append(i), m.s.pair[0].append(i), len(m.s.items) + len(m.s.pair[0]))[2])
add("mappingproxy", lambda: types.MappingProxyType({"a": []}), lambda m, y, i: (m.s["a"].append(i), len(m.s["a"]))[1])
add("mappingproxy of a tuple", lambda: types.MappingProxyType({"a": ([],)}), lambda m, y, i: (
    m.s["a"][0].append(i), len(m.s["a"][0]))[1])  # fmt: skip
add("object array", lambda: np.array([[0], None], object), lambda m, y, i: (m.s[0].append(i), len(m.s[0]))[1])
add("array", lambda: np.zeros(3), lambda m, y, i: (m.s.__setitem__(i % 3, i), float(m.s.sum()), m.s.copy())[1:])
add("least loaded", lambda: [[], [], []], lambda m, y, i: (min(m.s, key=len).append(i), [len(b) for b in m.s])[1])
add("most loaded", lambda: [[1], []], lambda m, y, i: (max(m.s, key=len).append(i), [len(b) for b in m.s])[1])
add("least of dicts", lambda: [{}, {}], lambda m, y, i: (min(m.s, key=len).update({i: i}), [len(b) for b in m.s])[1])
add("least of sets", lambda: [set(), set()], lambda m, y, i: (min(m.s, key=len).add(i), [len(b) for b in m.s])[1])
add("least of deques", lambda: [collections.deque(), collections.deque()], lambda m, y, i: (
    min(m.s, key=len).append(i), [len(b) for b in m.s])[1])  # fmt: skip
add("least of one's own", nothing, lambda m, y, i: (lambda bins: (min(bins, key=len).append(i), bins)[1])([[0], []]))
add(
    "part of a tuple",
    lambda: [([], 0), ([], 1)],
    lambda m, y, i: (max(m.s, key=lambda p: p[1])[0].append(i), len(m.s[1][0]))[1],
)
add("first of sorted", lambda: [[0], [1, 2]], lambda m, y, i: (sorted(m.s, key=len)[0].append(i), len(m.s[0]))[1])
add("first of reversed", lambda: [[0], []], lambda m, y, i: (next(reversed(m.s)).append(i), len(m.s[1]))[1])
add("of a filter", lambda: [[0], []], lambda m, y, i: (next(filter(None, m.s)).append(i), len(m.s[0]))[1])
add("of a map", lambda: [[0], []], lambda m, y, i: (next(map(lambda x: x, m.s)).append(i), len(m.s[0]))[1])
add("of a zip", lambda: [[0], []], lambda m, y, i: ([a.append(i) for a, b in zip(m.s, m.s)], len(m.s[0]))[1])
add("of a chain", lambda: [[0], []], lambda m, y, i: (list(itertools.chain(m.s))[0].append(i), len(m.s[0]))[1])
add("of an enumeration", lambda: [[0], []], lambda m, y, i: (dict(enumerate(m.s))[0].append(i), len(m.s[0]))[1])
add("of a slice", lambda: [[0], []], lambda m, y, i: (m.s[:1][0].append(i), len(m.s[0]))[1])
add("of a reduction", lambda: [[0], []], lambda m, y, i: (
    functools.reduce(lambda a, b: a if len(a) < len(b) else b, m.s).append(i), [len(b) for b in m.s])[1])  # fmt: skip
add("of values", lambda: {"a": [0]}, lambda m, y, i: (next(iter(m.s.values())).append(i), len(m.s["a"]))[1])
add(
    "of a copy",
    lambda: {"a": [0]},
    lambda m, y, i: (dict(m.s)["a"].append(i), copy.copy(m.s)["a"].append(i), len(m.s["a"]))[2],
)
add("of an itemgetter", lambda: ([], [0]), lambda m, y, i: (operator.itemgetter(1)(m.s).append(i), len(m.s[1]))[1])
add("partial's arguments", lambda: functools.partial(print, [0]), lambda m, y, i: (
    m.s.args[0].append(i), len(m.s.args[0]))[1])  # fmt: skip
add("partial's keywords", lambda: functools.partial(print, a=[0]), lambda m, y, i: (
    m.s.keywords["a"].append(i), len(m.s.keywords["a"]))[1])  # fmt: skip


def default() -> Callable[..., Any]:
    def function(x: Any, memo: Any = [], *, named: Any = []) -> Any:  # noqa: B006
        memo.append(x)
        named.append(x)
        return len(memo) + len(named)

    return function


add("default arguments", default, lambda m, y, i: (m.s(i), m.s.__defaults__, m.s.__kwdefaults__)[0])
add("default reached", default, lambda m, y, i: (m.s.__defaults__[0].append(i), len(m.s.__defaults__[0]))[1])
add("keyword default reached", default, lambda m, y, i: (
    m.s.__kwdefaults__["named"].append(i), len(m.s.__kwdefaults__["named"]))[1])  # fmt: skip
