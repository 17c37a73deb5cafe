# mypy: ignore-errors
# ruff: noqa: B005, B006, B007, B008, B010, B019, B023, B031, B035, B039, B905, C400, C416, C417, C419, E501, PLW0603, RUF005, RUF015, RUF100, SIM, UP, PLR, PERF, PYI
"""Steps of `STEPS` with iterators, generators, caches and names."""

import contextlib
import contextvars
import copy
import enum
import functools
import itertools
import operator
import random
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.graphs.python_containers import COLOURS, Colour
from tests.graphs.python_state import GLOBALS, Keeping, Record, Shared, add, keeps, nothing

# Generators and iterators

for draw in ("random", "gauss", "getrandbits", "randint", "choice", "shuffle", "uniform", "sample"):

    def drawn(m: Keeping, y: Tensor, i: int, draw: str = draw) -> Any:
        values = [1, 2, 3, 4, 5, 6, 7, 8, 9]
        arguments = {
            "getrandbits": (8,),
            "randint": (1, 9),
            "choice": (values,),
            "shuffle": (values,),
            "uniform": (0, 1),
            "sample": (values, 2),
        }
        return getattr(m.s, draw)(*arguments.get(draw, (0, 1) if draw == "gauss" else ())), values

    add(f"generator's {draw}", lambda: random.Random(3), drawn)
add("generator by a tensor", lambda: random.Random(3), lambda m, y, i: y * m.s.random())
add("generator branches", lambda: random.Random(3), lambda m, y, i: y if m.s.random() < 0.5 else y * 2)
add("generator seeded", lambda: random.Random(3), lambda m, y, i: (m.s.seed(i), m.s.random())[1])
add("generator's state", lambda: random.Random(3), lambda m, y, i: (m.s.setstate(m.s.getstate()), m.s.random())[1])
add("generator's method", lambda: (random.Random(3).random,), lambda m, y, i: y * m.s[0]())
add("generator in a list", lambda: [random.Random(3)], lambda m, y, i: y * m.s[0].random())
add("generator made anew", nothing, lambda m, y, i: (lambda r: (r.random(), r.randint(1, 99)))(random.Random(i)))
add("generator made and kept", dict, lambda m, y, i: m.s.setdefault("r", random.Random(3)).random())
add("subclass of a generator", lambda: type("R", (random.Random,), {})(3), lambda m, y, i: y * m.s.random())
add("NumPy's generator", lambda: np.random.default_rng(3), lambda m, y, i: y * float(m.s.random()))
add("NumPy's old generator", lambda: np.random.RandomState(3), lambda m, y, i: y * float(m.s.rand()))
add("itertools.count", lambda: itertools.count(1), lambda m, y, i: y * next(m.s))
add("itertools.cycle", lambda: itertools.cycle([1.0, 2.0, 3.0]), lambda m, y, i: y * next(m.s))
add("iterator of a list", lambda: iter(list(range(9))), lambda m, y, i: next(m.s))
add("iterator of a tuple", lambda: iter(tuple(range(9))), lambda m, y, i: next(m.s))
add("iterator of a range", lambda: iter(range(9)), lambda m, y, i: next(m.s))
add("iterator of a dict", lambda: iter({k: k for k in range(9)}), lambda m, y, i: next(m.s))
add("iterator of text", lambda: iter("abcdefghi"), lambda m, y, i: next(m.s))
add("enumerate kept", lambda: enumerate("abcdefghi"), lambda m, y, i: next(m.s))
add("zip kept", lambda: zip(range(9), "abcdefghi", strict=True), lambda m, y, i: next(m.s))
add("map kept", lambda: map(str, range(9)), lambda m, y, i: next(m.s))
add("filter kept", lambda: filter(None, range(1, 9)), lambda m, y, i: next(m.s))
add("reversed kept", lambda: reversed(range(9)), lambda m, y, i: next(m.s))
add("chain kept", lambda: itertools.chain([1, 2, 3], [4, 5, 6, 7]), lambda m, y, i: next(m.s))
add("islice kept", lambda: itertools.islice(itertools.count(), 1, None, 2), lambda m, y, i: next(m.s))
add("accumulate kept", lambda: itertools.accumulate(range(1, 9)), lambda m, y, i: next(m.s))
add("repeat kept", lambda: itertools.repeat(2, 4), lambda m, y, i: next(m.s, "none left"))
add("iterator in a tuple", lambda: (iter([1, 2, 3, 4, 5, 6, 7]),), lambda m, y, i: next(m.s[0]))


def counting() -> Iterator[float]:
    k = 1.0
    while True:
        yield k
        k *= 1.5


add("generator function kept", counting, lambda m, y, i: y * next(m.s))
add("itertools", nothing, lambda m, y, i: (
    list(itertools.accumulate(range(i))), list(itertools.product("ab", range(i % 3))), list(itertools.islice(itertools.count(i), 2)),
    list(itertools.pairwise(range(i))), list(itertools.combinations(range(i % 4), 2)), list(itertools.repeat(i, 2))))  # fmt: skip
add(
    "zip and enumerate",
    nothing,
    lambda m, y, i: (list(zip(range(i), "abc")), list(enumerate("ab", i)), list(reversed(range(i)))),
)
add(
    "any and all",
    lambda: [0, 0],
    lambda m, y, i: (m.s.append(i % 3), any(m.s), all(m.s[1:]), sum(k > 1 for k in m.s))[1:],
)
add(
    "sorted",
    lambda: {"b": 1, "a": 2},
    lambda m, y, i: (m.s.update({f"c{-i % 3}": i}), sorted(m.s), sorted(m.s, key=m.s.get, reverse=True))[1:],
)

# Caches


def cached() -> Any:
    calls: list[Any] = []

    @functools.lru_cache(maxsize=2)
    def table(size: int) -> Any:
        calls.append(size)
        return torch.arange(size).float() + len(calls)

    return types.SimpleNamespace(table=table, calls=calls)


add(
    "lru_cache",
    cached,
    lambda m, y, i: (y + m.s.table(3).to(y.device), list(m.s.calls))[1:] if i > 9 else y + m.s.table(3).to(y.device),
)
add("lru_cache of a number", cached, lambda m, y, i: (m.s.table(i % 3), len(m.s.calls))[1])
add(
    "lru_cache's statistics",
    cached,
    lambda m, y, i: (m.s.table(i % 2), m.s.table.cache_info().hits, m.s.table.cache_info().misses)[1:],
)
add(
    "lru_cache cleared",
    cached,
    lambda m, y, i: (m.s.table(3), m.s.table.cache_clear() if i == 3 else None, len(m.s.calls))[2],
)


class Cached:
    def __init__(self) -> None:
        self.calls = 0

    @functools.cache  # noqa: B019
    def method(self, k: int) -> int:
        self.calls += 1
        return self.calls

    @functools.cached_property
    def value(self) -> int:
        self.calls += 1
        return self.calls

    @property
    def counted(self) -> int:
        self.calls += 1
        return self.calls

    @counted.setter
    def counted(self, value: int) -> None:
        self.calls = value * 2


add("cache on a method", Cached, lambda m, y, i: (m.s.method(i % 2), y * m.s.method(0), m.s.calls))
add(
    "cached property",
    Cached,
    lambda m, y, i: (vars(m.s).pop("value", None) if i == 3 else None, y * m.s.value, m.s.calls)[1:],
)
add("property", Cached, lambda m, y, i: (m.s.counted, y * m.s.counted))
add("property set", Cached, lambda m, y, i: (setattr(m.s, "counted", i), m.s.calls)[1])
add("memo", dict, lambda m, y, i: m.s[i % 2] if i % 2 in m.s else m.s.setdefault(i % 2, y.sum() + i))
add("memo by shape", dict, lambda m, y, i: m.s.setdefault(tuple(y.shape), y * i))

# Names

add("class attribute", nothing, lambda m, y, i: (setattr(Shared, "count", Shared.count + 1), Shared.count)[1])
add(
    "class attribute of the module",
    nothing,
    lambda m, y, i: (setattr(type(m), "total", Keeping.total + i), m.total, y * Keeping.total)[1:],
)
add("global", nothing, lambda m, y, i: (GLOBALS.__setitem__("n", GLOBALS.get("n", 0) + 1), y * GLOBALS["n"])[1])
add("global list", nothing, lambda m, y, i: (GLOBALS.setdefault("l", []).append(i), len(GLOBALS["l"]))[1])
add(
    "global tuple of lists",
    nothing,
    lambda m, y, i: (GLOBALS.setdefault("t", ([], []))[0].append(i), len(GLOBALS["t"][0]))[1],
)
add("submodule's list", nothing, lambda m, y, i: (vars(m.net).setdefault("h", []).append(i), len(m.net.h))[1])
add(
    "submodule's tuple of lists",
    nothing,
    lambda m, y, i: (vars(m.net).setdefault("h", ([],))[0].append(i), len(m.net.h[0]))[1],
)
add(
    "parameter's list",
    nothing,
    lambda m, y, i: (vars(m.net.weight).setdefault("h", []).append(i), len(m.net.weight.h))[1],
)
add(
    "tensor's list",
    lambda: (lambda t: (setattr(t, "h", [0]), [t])[1])(torch.zeros(2)),
    lambda m, y, i: (m.s[0].h.append(i), len(m.s[0].h))[1],
)
add("hparams", nothing, lambda m, y, i: (m.hparams.setdefault("h", []).append(i), len(m.hparams["h"]))[1])
add("enum's value", lambda: enum.Enum("E", {"A": [0]}), lambda m, y, i: (m.s.A.value.append(i), len(m.s.A.value))[1])
add("enum", nothing, lambda m, y, i: (Colour(i % 3).name, COLOURS[i % 3] is Colour.RED, Colour["RED"].value + i))
add("attributes", lambda: types.SimpleNamespace(), lambda m, y, i: (
    hasattr(m.s, "k1"), setattr(m.s, f"k{i}", i), getattr(m.s, f"k{i - 1}", None), sorted(vars(m.s)))[::3])  # fmt: skip
add(
    "attribute deleted",
    lambda: types.SimpleNamespace(a=0),
    lambda m, y, i: (delattr(m.s, "a"), setattr(m.s, "a", i), m.s.a)[2],
)
add(
    "attributes by vars",
    lambda: types.SimpleNamespace(a=[0]),
    lambda m, y, i: (vars(m.s)["a"].append(i), len(m.s.__dict__["a"]))[1],
)
add(
    "weak reference",
    lambda: (lambda r: (r, weakref.ref(r)))(Record()),
    lambda m, y, i: (m.s[1]().items.append(i), len(m.s[0].items))[1],
)
add(
    "context variable",
    lambda: contextvars.ContextVar("x", default=[0]),
    lambda m, y, i: (m.s.get().append(i), len(m.s.get()))[1],
)
add(
    "copies",
    lambda: {"a": [0]},
    lambda m, y, i: (copy.deepcopy(m.s), m.s["a"].append(i), copy.copy(m.s["a"]), m.s["a"][:])[2:],
)
add(
    "aliases",
    lambda: (lambda a: {"a": a, "b": a, "c": (a,)})([]),
    lambda m, y, i: (m.s["a"].append(i), m.s["c"][0].append(-i), len(m.s["b"]))[2],
)
add(
    "two names, one list",
    lambda: (lambda a: [a, a])([0]),
    lambda m, y, i: (m.s[0].append(i), m.s[1] is m.s[0], len(m.s[1]))[1:],
)
add(
    "partial",
    lambda: functools.partial(lambda a, b, c=0: a + b * c, 1),
    lambda m, y, i: (m.s(i, c=2), functools.partial(m.double)(i), functools.reduce(operator.add, range(i), 0)),
)
add("method of the module", nothing, lambda m, y, i: (m.double(i), m.double(y), m.double(str(i))))


def closure() -> Any:
    n, seen, last = 0, ([],), None

    def scale(y: Any) -> Any:
        nonlocal n, last
        n += 1
        seen[0].append(n)
        last = y if last is None else last * 0.5 + y
        return last * n, len(seen[0])

    return scale


add("nonlocal", closure, lambda m, y, i: m.s(y))
add("lambda made", list, lambda m, y, i: (m.s.append(lambda k=i: k * 2), [f() for f in m.s])[1])
add(
    "arguments",
    nothing,
    lambda m, y, i: (lambda *a, b=0, **k: (a, b, sorted(k.items())))(i, *range(i), b=i, **{f"k{i}": i}),
)


@keeps("try", list)
def _(m: Keeping, y: Tensor, i: int) -> Any:
    try:
        if i % 2:
            raise KeyError(i)
        m.s.append("even")
    except KeyError as error:
        m.s.append(error.args[0])
    else:
        m.s.append("else")
    finally:
        m.s.append(i)
    return len(m.s)


@keeps("try a look-up", lambda: {0: "a", 3: "b"})
def _(m: Keeping, y: Tensor, i: int) -> Any:
    try:
        return m.s[i]
    except KeyError:
        m.s[i] = i
        return "missing"


@keeps("with", list)
def _(m: Keeping, y: Tensor, i: int) -> Any:
    @contextlib.contextmanager
    def noted() -> Iterator[int]:
        m.s.append("in")
        yield i
        m.s.append("out")

    with noted() as k, contextlib.suppress(ValueError), torch.no_grad():
        m.s.append(k)
        int("x")
    return len(m.s)


@keeps("match", list)
def _(m: Keeping, y: Tensor, i: int) -> Any:
    match (i % 3, i):
        case (0, k):
            m.s.append(("zero", k))
        case (1, k) if k > 2:
            m.s.append("late")
        case _:
            m.s.append(None)
    match {"a": [i, 1]}:
        case {"a": [first, *rest]}:
            return first, rest, m.s[-1]


@keeps("loops", lambda: {"n": 0})
def _(m: Keeping, y: Tensor, i: int) -> Any:
    while m.s["n"] < i * 2:
        m.s["n"] += 1
        if m.s["n"] == 5:
            break
    else:
        m.s["whole"] = i
    for k in range(i):
        if k == 2:
            continue
        y = y + k
    return y, m.s["n"], [k for k in range(i) if k % 2]


@keeps("unpacking", lambda: [0, 1, 2])
def _(m: Keeping, y: Tensor, i: int) -> Any:
    first, *rest = m.s
    m.s = [*rest, first + i]
    a, b = (i, y) if i % 2 else (y, i)
    del m.s[0]
    m.s.insert(0, first)
    return a, b, first


@keeps("augmented", lambda: types.SimpleNamespace(n=0, t=(), s="", f=1.0, l=[], d={"a": [0]}))
def _(m: Keeping, y: Tensor, i: int) -> Any:
    m.s.n += i
    m.s.t += (i,)
    m.s.s += str(i)
    m.s.f *= 1.5
    m.s.l += [i]
    m.s.d["a"][0] += i
    m.s.d["a"] *= 1
    return y * m.s.n, m.s.t, m.s.s, m.s.f, len(m.s.l), m.s.d["a"][0]


@keeps("global statement", nothing)
def _(m: Keeping, y: Tensor, i: int) -> Any:
    global counter
    counter = i if i == 0 else counter + 1
    return counter


@keeps("a history with its bound", list)
def _(m: Keeping, y: Tensor, i: int) -> Any:
    m.s = (m.s + [y])[-3:]
    m.s[:] = m.s[-2:]
    return torch.stack(m.s).sum(0)


counter = 0
