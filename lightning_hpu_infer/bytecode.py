"""What functions are seen to name and to change, without calling them."""

import dis
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from types import CodeType, MappingProxyType
from typing import Any, NamedTuple

# Methods that change what they belong to; so do those of tensors whose names end with an underscore.
_CHANGES = {
    name
    for kind, fixed in ((list, tuple), (deque, tuple), (set, frozenset), (dict, MappingProxyType))
    for name in dir(kind)
    if name not in dir(fixed)
} - {"copy", "fromkeys", "maxlen"}
_LOADS_ARGUMENT = {"LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_DEREF"}
_Step = tuple[str, Any]


class Seen(NamedTuple):
    """What a function does by name, with the functions inside of it."""

    variables: frozenset[str]
    """Global variables that it loads."""
    parts: frozenset[tuple[str, str]]
    """Attributes of global variables that it loads, each with the variable first."""
    stored: frozenset[str]
    """Global variables that it assigns to."""
    stored_in_cells: frozenset[str]
    """Variables of functions around it that it assigns to, and its own that functions inside of it use."""
    assigned: frozenset[str]
    """Attributes of anything that it assigns to."""
    filled: frozenset[str]
    """Attributes and variables whose content it changes."""


@lru_cache(maxsize=4096)
def seen_in(code: CodeType) -> Seen:
    """What is seen in a code. Names stand for objects, so it is a guess, and only of what is named."""
    steps = list(_steps_of(code))
    inner = [seen_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    own = Seen(
        frozenset(name for kind, name in steps if kind == "LOAD_GLOBAL"),
        frozenset(
            (steps[at - 1][1], name)
            for at, (kind, name) in enumerate(steps)
            if at and _loads_attribute(kind) and steps[at - 1][0] == "LOAD_GLOBAL"
        ),
        frozenset(name for kind, name in steps if kind in ("STORE_GLOBAL", "DELETE_GLOBAL")),
        frozenset(name for kind, name in steps if kind in ("STORE_DEREF", "DELETE_DEREF")),
        frozenset(name for kind, name in steps if kind in ("STORE_ATTR", "DELETE_ATTR")),
        frozenset(_filled(steps)),
    )
    return Seen(*(frozenset().union(*sets) for sets in zip(own, *inner, strict=True)))


def names_in(code: CodeType) -> Iterator[str]:
    """The attributes and global variables that a code names, with the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


class Uses(NamedTuple):
    """What a function does with an argument."""

    attributes: frozenset[str]
    """Those that it loads."""
    assigned: frozenset[str]
    """Attributes that it assigns to."""
    passed_on: bool
    """Whether it gives the argument itself to something else."""


def uses_of(code: CodeType, argument: str) -> Uses:
    """What a code, and the functions in it, do with a variable of this name."""
    steps = list(_steps_of(code))
    uses = [step for (kind, name), step in pairwise(steps) if name == argument and kind in _LOADS_ARGUMENT]
    inner = [uses_of(constant, argument) for constant in code.co_consts if isinstance(constant, CodeType)]
    attributes = {name for kind, name in uses if _loads_attribute(kind)}
    assigned = {name for kind, name in uses if kind == "STORE_ATTR"}
    return Uses(
        frozenset(attributes).union(*(each.attributes for each in inner)),
        frozenset(assigned).union(*(each.assigned for each in inner)),
        len(uses) > len([kind for kind, _ in uses if _loads_attribute(kind) or kind == "STORE_ATTR"])
        or any(each.passed_on for each in inner),
    )


def _steps_of(code: CodeType) -> Iterator[_Step]:
    """Its instructions; Python 3.13 has some that are two in one, such as LOAD_FAST_LOAD_FAST."""
    for step in dis.get_instructions(code):
        if isinstance(step.argval, tuple) and step.opname.count("_FAST") == 2:
            first, _, second = step.opname.partition("_FAST_")
            yield from zip((f"{first}_FAST", second), step.argval, strict=True)
        elif step.opname != "EXTENDED_ARG":
            yield step.opname, step.argval


def _filled(steps: list[_Step]) -> Iterator[str]:
    aliases: dict[str, int] = {}  # where the value of a local variable was loaded
    for at, (kind, name) in enumerate(steps):
        if kind == "STORE_FAST":
            aliases[name] = at - 1
        elif target := _target(steps, at):
            yield from _names_of(steps, at - target, aliases)


def _target(steps: list[_Step], at: int) -> int:
    """So many instructions ago the object was loaded that this one changes; 0 if it changes none."""
    kind, name = steps[at]
    if kind in ("STORE_ATTR", "DELETE_ATTR"):
        return 1
    if _loads_attribute(kind):
        return int(name in _CHANGES or (name.endswith("_") and not name.endswith("__")))
    if kind in ("STORE_SUBSCR", "DELETE_SUBSCR"):
        return 4 if steps[at - 1][0] == "BUILD_SLICE" else 2
    return 3 if kind == "STORE_SLICE" else 0


def _names_of(steps: list[_Step], at: int, aliases: dict[str, int]) -> Iterator[str]:
    """The names under which an object is found that an instruction loads, and those of what it is a part of."""
    while at >= 0:
        kind, name = steps[at]
        if kind in ("LOAD_GLOBAL", "LOAD_DEREF") or _loads_attribute(kind):
            yield name
        if kind == "BINARY_SUBSCR":
            at -= 2
        elif _loads_attribute(kind):
            at -= 1
        elif kind.startswith("LOAD_FAST") and aliases.get(name, at) < at:
            at = aliases[name]
        else:
            return


def _loads_attribute(kind: str) -> bool:
    return kind in ("LOAD_ATTR", "LOAD_METHOD")
