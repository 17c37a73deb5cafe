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
_VARIABLES = ("LOAD_GLOBAL", "LOAD_DEREF")
_MOVES = ("SWAP", "COPY", "ROT_", "DUP_")
_ENDS = ("STORE_", "DELETE_", "POP_TOP", "RETURN_", "POP_JUMP", "JUMP_IF", "FOR_ITER")
_SETTERS = {"setattr", "delattr", "vars", "__dict__", "__setattr__", "__setitem__"}
_IN_PLACE = "INPLACE"
_Step = tuple[str, Any]
# What draws random numbers, or seeds: methods of tensors, functions of torch, of Python and NumPy.
_OF_TENSORS = "bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_"
_OF_TORCH = (
    "rand randn randint randperm rand_like randn_like randint_like normal bernoulli multinomial poisson"
    " gumbel_softmax sample rsample"
)
_OF_PYTHON = (
    "random uniform randrange choice choices shuffle gauss triangular getrandbits randbytes permutation integers"
)
_OF_SEEDS = "seed manual_seed set_rng_state setstate set_state fork_rng isolate_rng seed_everything"
# Drawn from by the functions of these names only: modules that are attributes draw nothing in eval mode.
_OF_FUNCTIONS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu")
_RANDOM = frozenset(" ".join((_OF_TENSORS, _OF_TORCH, _OF_PYTHON, _OF_SEEDS)).split())


class Seen(NamedTuple):
    """What a function does by name, with the functions inside of it."""

    variables: frozenset[str]
    """Global variables that it loads."""
    parts: frozenset[tuple[str, str]]
    """Attributes of global variables, and of these, that it loads, each with the variable first."""
    stored: frozenset[str]
    """Global variables that it assigns to."""
    stored_in_cells: frozenset[str]
    """Variables of functions around it that it assigns to, and its own that functions inside of it use."""
    assigned: frozenset[str]
    """Attributes of anything that it assigns to."""
    filled: frozenset[str]
    """Attributes and variables whose content it changes."""
    changed_arguments: frozenset[str]
    """Arguments whose content it changes."""
    statements: frozenset[frozenset[str]]
    """The attributes and variables that each of its statements names."""


@lru_cache(maxsize=4096)
def seen_in(code: CodeType) -> Seen:
    """What is seen in a code. Names stand for objects, so it is a guess, and only of what is named."""
    steps = list(_steps_of(code))
    inner = [seen_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    changes = _Changes(steps)
    own = Seen(
        frozenset(name for kind, name in steps if kind == "LOAD_GLOBAL"),
        frozenset(_parts(steps)),
        frozenset(name for kind, name in steps if kind in ("STORE_GLOBAL", "DELETE_GLOBAL")),
        frozenset(name for kind, name in steps if kind in ("STORE_DEREF", "DELETE_DEREF")),
        frozenset(name for kind, name in steps if kind in ("STORE_ATTR", "DELETE_ATTR")),
        frozenset(changes.names),
        frozenset(changes.locals).intersection(code.co_varnames[: code.co_argcount]),
        frozenset(changes.statements),
    )
    return Seen(*(frozenset().union(*sets) for sets in zip(own, *inner, strict=True)))


def names_in(code: CodeType) -> Iterator[str]:
    """The attributes and global variables that a code names, with the functions in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def draws(code: CodeType) -> bool:
    """Whether a code is seen to draw random numbers, or to seed what they are drawn from."""
    if not _RANDOM.isdisjoint(names_in(code)):
        return True
    seen = seen_in(code)
    called = seen.variables.union(name for _, name in seen.parts)
    return not called.isdisjoint(_OF_FUNCTIONS)


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
        elif step.opname.startswith("INPLACE_") or (step.opname == "BINARY_OP" and step.argrepr.endswith("=")):
            yield _IN_PLACE, None
        elif step.opname != "EXTENDED_ARG":
            yield step.opname, step.argval


def _parts(steps: list[_Step]) -> Iterator[tuple[str, str]]:
    variable = None
    for kind, name in steps:
        if kind == "LOAD_GLOBAL":
            variable = name
        elif not _loads_attribute(kind):
            variable = None
        elif variable is not None:
            yield variable, name


class _Changes:
    """The names under which what is changed was found, in the instructions of a function."""

    def __init__(self, steps: list[_Step]) -> None:
        self.names = set[str]()
        self.locals = set[str]()
        self.statements = set[frozenset[str]]()
        self._steps = steps
        self._aliases: dict[str, int] = {}  # where the value of a local variable was loaded
        begin = 0
        for at, (kind, name) in enumerate(steps):
            target = _target(steps, at)
            # Between them are others where the object has been loaded before, to be read.
            if kind == _IN_PLACE or (target and steps[at - target][0].startswith(_MOVES)):
                self._add_all(begin, at)
            elif target:
                self._add(at - target)
            if kind.startswith(_ENDS):
                self._end(begin, at)
                begin = at + 1
                if kind == "STORE_FAST":
                    self._aliases[name] = at - 1

    def _end(self, begin: int, end: int) -> None:
        named = frozenset(name for kind, name in self._steps[begin:end] if kind in _VARIABLES or _loads_attribute(kind))
        self.statements.add(named)
        if not named.isdisjoint(_SETTERS):
            self._add_all(begin, end)

    def _add_all(self, begin: int, end: int) -> None:
        for at in range(begin, end):
            self._add(at)

    def _add(self, at: int) -> None:
        """Add the names under which an object is found that an instruction loads, and those of what it is a part of."""
        while at >= 0:
            kind, name = self._steps[at]
            if kind in _VARIABLES or _loads_attribute(kind):
                self.names.add(name)
            if kind == "BINARY_SUBSCR":
                at -= 2
            elif _loads_attribute(kind):
                at -= 1
            elif kind.startswith("LOAD_FAST") and self._aliases.get(name, at) < at:
                at = self._aliases[name]
            else:
                if kind.startswith("LOAD_FAST"):
                    self.locals.add(name)
                return


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


def _loads_attribute(kind: str) -> bool:
    return kind in ("LOAD_ATTR", "LOAD_METHOD")
