# mypy: ignore-errors
# ruff: noqa: B005, B006, B007, B008, B010, B019, B023, B031, B035, B039, B905, C400, C416, C417, C419, E501, PLW0603, RUF005, RUF015, RUF100, SIM, UP, PLR, PERF, PYI
"""Steps of `STEPS` with arrays, sets, dictionaries and deques."""

import collections
import enum
import operator
import types
from typing import Any

import numpy as np
import torch

from tests.graphs.python_state import Shared, add


class Colour(enum.Enum):
    RED = 0
    GREEN = 1
    BLUE = 2


COLOURS = list(Colour)

# Arrays

add("array read", lambda: np.zeros(3), lambda m, y, i: (m.s.__setitem__(0, i), y * m.s[0])[1])
add("array read as a float", lambda: np.zeros(3), lambda m, y, i: (m.s.__setitem__(0, i), y * float(m.s[0]))[1])
add("array read twice", lambda: np.arange(6.0), lambda m, y, i: y * m.s[i])
add("array sum", lambda: np.zeros(3), lambda m, y, i: (operator.iadd(m.s, i), y * m.s.sum(), m.s.shape, len(m.s))[1:])
add("array in a list", lambda: [np.zeros(3)], lambda m, y, i: (operator.iadd(m.s[0], i), y * m.s[0][1])[1])
add("array row", lambda: np.zeros((2, 3)), lambda m, y, i: (m.s[0].__setitem__(1, i), y * m.s[0, 1])[1])
add("array iterated", lambda: np.zeros(3), lambda m, y, i: (operator.iadd(m.s, i), sum(float(v) for v in m.s))[1])
add("array compared", lambda: np.zeros(3), lambda m, y, i: (operator.iadd(m.s, i), y * 2 if m.s[0] > 3 else y)[1])
add("array as a tensor", lambda: np.zeros(3, "float32"), lambda m, y, i: (
    operator.iadd(m.s, i), y + torch.from_numpy(m.s).to(y.device), torch.as_tensor(m.s))[1:2])  # fmt: skip
add("array min", lambda: np.zeros(3), lambda m, y, i: (operator.iadd(m.s, i), y * max(m.s), y * min(m.s[0], 3))[1:])
add("array element as an index", lambda: np.array([0, 1, 2, 0, 1, 2]), lambda m, y, i: y[:, m.s[i]])
add("array bool", lambda: np.zeros(1), lambda m, y, i: (operator.iadd(m.s, i % 2), "yes" if m.s else "no")[1])
add("array of text", lambda: np.array(["aaa", "b"]), lambda m, y, i: (m.s.__setitem__(0, str(i)), str(m.s[0]))[1])
add("array scalar", lambda: types.SimpleNamespace(v=np.float32(1)), lambda m, y, i: (
    setattr(m.s, "v", m.s.v * np.float32(1.5)), y * m.s.v)[1])  # fmt: skip
add("array int", lambda: types.SimpleNamespace(v=np.int64(1)), lambda m, y, i: (
    setattr(m.s, "v", m.s.v + 1), y * m.s.v, f"{m.s.v:03d}")[1:])  # fmt: skip
add(
    "bytearray",
    lambda: bytearray(3),
    lambda m, y, i: (m.s.__setitem__(0, i), m.s.append(i), y * m.s[0], bytes(m.s))[2:],
)
add("memoryview", lambda: memoryview(bytearray(3)), lambda m, y, i: (m.s.__setitem__(0, i), y * m.s[0])[1])

# Sets

add("set", set, lambda m, y, i: (m.s.add(i % 4), len(m.s), sorted(m.s))[1:])
add("set of enums", set, lambda m, y, i: (m.s.add(COLOURS[i % 3]), len(m.s), COLOURS[i % 3] in m.s)[1:])
add("set of enums, filled", lambda: {Colour.BLUE}, lambda m, y, i: (m.s.add(COLOURS[i % 3]), len(m.s))[1])
add("set of classes", lambda: {int}, lambda m, y, i: (m.s.add((float, str, bool)[i % 3]), len(m.s))[1])
add("set of functions", lambda: {len}, lambda m, y, i: (m.s.add((max, min, abs)[i % 3]), len(m.s))[1])
add("set of tuples", lambda: {(0, "a")}, lambda m, y, i: (m.s.add((i, "a")), m.s.discard((i - 1, "a")), len(m.s))[2])
add("set of objects", lambda: {0: {Shared}}, lambda m, y, i: (m.s[0].add(i), len(m.s[0]))[1])
add(
    "set updates",
    lambda: {1, 2},
    lambda m, y, i: (m.s.update({i, i + 1}), m.s.difference_update({i - 1}), sorted(m.s))[2],
)
add("set algebra", lambda: {1, 2}, lambda m, y, i: (setattr(m, "s", m.s | {i}), len(m.s & {0, 2}), len(m.s ^ {3}))[1:])
add("frozenset", lambda: frozenset({1}), lambda m, y, i: (setattr(m, "s", m.s | {i}), len(m.s))[1])
add("set pop", lambda: {1}, lambda m, y, i: (m.s.add(i + 5), m.s.remove(1) if i == 0 else None, len(m.s))[2])

# Dictionaries

add("dict", dict, lambda m, y, i: (m.s.__setitem__(i % 3, i), m.s.get(2, -1), list(m.s.items()))[1:])
add("dict setdefault", dict, lambda m, y, i: (m.s.setdefault(i % 2, []).append(i), len(m.s[i % 2]))[1])
add("dict pop", lambda: {k: k for k in range(9)}, lambda m, y, i: (m.s.pop(i), m.s.pop("no", None), len(m.s)))
add("dict update", dict, lambda m, y, i: (m.s.update({f"k{i}": i}, z=i), sorted(m.s), "k1" in m.s)[1:])
add("dict comprehension", lambda: {"a": 1}, lambda m, y, i: setattr(m, "s", {k + "a": v + i for k, v in m.s.items()}))
add("dict merged", lambda: {"a": 1}, lambda m, y, i: (setattr(m, "s", m.s | {i: i}), {**m.s, "z": i})[1])
add(
    "dict by enum",
    lambda: {c: [] for c in Colour},
    lambda m, y, i: (m.s[COLOURS[i % 3]].append(i), len(m.s[Colour.RED]))[1],
)
add("dict by class", lambda: {int: [0]}, lambda m, y, i: (m.s[int].append(i), len(m.s[int]))[1])
add("dict by tuple", lambda: {("a", 1): [0]}, lambda m, y, i: (m.s["a", 1].append(i), len(m.s["a", 1]))[1])
add(
    "dict order",
    lambda: {"a": 0, "b": 1},
    lambda m, y, i: (m.s.__setitem__("a", m.s.pop("a")), list(m.s), m.s[next(iter(m.s))])[1:],
)
add("dict deleted", lambda: {k: k for k in range(9)}, lambda m, y, i: (m.s.__delitem__(i), len(m.s), min(m.s))[1:])
add(
    "defaultdict",
    lambda: collections.defaultdict(list),
    lambda m, y, i: (m.s[i % 2].append(i), len(m.s[0]), len(m.s))[1:],
)
add(
    "defaultdict of int",
    lambda: collections.defaultdict(int),
    lambda m, y, i: (m.s.__setitem__(i % 2, m.s[i % 2] + 1), dict(m.s))[1],
)
add("nested defaultdict", lambda: collections.defaultdict(lambda: collections.defaultdict(int)), lambda m, y, i: (
    m.s[i % 2].__setitem__("n", m.s[i % 2]["n"] + i), m.s[i % 2]["n"])[1])  # fmt: skip
add("counter", collections.Counter, lambda m, y, i: (m.s.update([i % 3]), m.s.most_common(1), m.s[i % 3])[1:])
add("counter of text", collections.Counter, lambda m, y, i: (m.s.update(f"a{i}"), m.s["a"], m.s.total())[1:])
add("ordered dict", collections.OrderedDict, lambda m, y, i: (
    m.s.__setitem__(i % 4, i), m.s.move_to_end(i % 4), m.s.popitem(last=False) if len(m.s) > 2 else None, list(m.s))[3])  # fmt: skip
add("chain map", lambda: collections.ChainMap({}, {"a": [0]}), lambda m, y, i: (m.s["a"].append(i), len(m.s["a"]))[1])
add("user dict", lambda: collections.UserDict(a=[0]), lambda m, y, i: (m.s["a"].append(i), len(m.s["a"]))[1])
add("user list", lambda: collections.UserList([[0]]), lambda m, y, i: (m.s[0].append(i), len(m.s[0]))[1])


class Bag(dict[Any, Any]):
    pass


class Row(list[Any]):
    pass


class Both(tuple[Any, ...]):
    __slots__ = ()


class Unique(set[Any]):
    pass


add(
    "subclass of dict",
    lambda: Bag(a=[]),
    lambda m, y, i: (m.s["a"].append(i), m.s.update(b=i), len(m.s["a"]), m.s["b"])[2:],
)
add("subclass of list", Row, lambda m, y, i: (m.s.append(i), len(m.s), m.s[-1])[1:])
add("subclass of tuple", lambda: Both(([], [])), lambda m, y, i: (m.s[0].append(i), len(m.s[0]))[1])
add("subclass of set", Unique, lambda m, y, i: (m.s.add(i), len(m.s), i in m.s)[1:])
add(
    "subclass of deque",
    lambda: type("Last", (collections.deque,), {})(maxlen=2),
    lambda m, y, i: (m.s.append(i), list(m.s))[1],
)

# Deques

for kept in (None, 1, 3):
    add(
        f"deque of {kept}",
        lambda kept=kept: collections.deque(maxlen=kept),
        lambda m, y, i: (m.s.append(i), len(m.s), sum(m.s))[1:],
    )
    add(f"deque of {kept} tensors", lambda kept=kept: collections.deque(maxlen=kept), lambda m, y, i: (
        m.s.append(y), torch.stack(list(m.s)).mean(0))[1])  # fmt: skip
add(
    "deque from the left",
    lambda: collections.deque(maxlen=3),
    lambda m, y, i: (m.s.appendleft(i), list(m.s), m.s.maxlen)[1:],
)
add("deque extended", lambda: collections.deque(maxlen=3), lambda m, y, i: (m.s.extend([i, -i]), list(m.s))[1])
add("deque extended left", lambda: collections.deque(maxlen=3), lambda m, y, i: (m.s.extendleft([i, -i]), list(m.s))[1])
add("deque in place", lambda: collections.deque(maxlen=3), lambda m, y, i: (operator.iadd(m.s, [i, i]), list(m.s))[1])
add(
    "deque copied",
    lambda: collections.deque(maxlen=2),
    lambda m, y, i: (setattr(m, "s", m.s.copy()), m.s.append(i), list(m.s))[2],
)
add(
    "deque concatenated",
    lambda: collections.deque([8], 2),
    lambda m, y, i: (setattr(m, "s", m.s + m.s), m.s.append(i), list(m.s))[2],
)
add("deque made anew", lambda: collections.deque([8], 2), lambda m, y, i: (
    setattr(m, "s", collections.deque(m.s, maxlen=2)), m.s.append(i), list(m.s))[2])  # fmt: skip
add("deque rotated", lambda: collections.deque([1, 2, 3], 3), lambda m, y, i: (m.s.rotate(1), m.s[0], list(m.s))[1:])
add("deque popped", lambda: collections.deque(range(9), 9), lambda m, y, i: (m.s.popleft(), m.s.append(i), len(m.s)))
add(
    "deque in a dict",
    lambda: {"a": collections.deque(maxlen=2)},
    lambda m, y, i: (m.s["a"].append(i), list(m.s["a"]))[1],
)
add("deque kept elsewhere", dict, lambda m, y, i: m.s.setdefault("q", collections.deque(maxlen=2)).append(i))
