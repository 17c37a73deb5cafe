"""Which combinations of flags cases run with: all pairs of values, in few sets."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any


class _Same:
    """A `postprocess` that changes nothing."""

    def __call__(self, output: Any) -> Any:
        return output

    def __repr__(self) -> str:
        return "same"


VALUES: dict[str, tuple[Any, ...]] = {
    "hpu_graphs": (True, False),
    "max_graphs": (16, 1),
    "graph_memory": (None, 4096),
    "verify_graphs": (1, 0),
    "pad_batch": (False, True),
    "async_copy": (True, False),
    "async_output": (True, False),
    "pipelining": (True, False, "auto"),
    "prefetch": (None, 0, 4),
    "in_flight": (None, 0, 3),
    "defer_hooks": ("auto", True, False),
    "postprocess": (None, _Same()),
}
"""Each flag's values, its default first."""

ELSEWHERE = {
    "graph_modules": "names modules, of which the cases have different ones: tests/graphs/test_step.py",
    "depth_memory": "bounds depths that a run raises after 32 batches: tests/test_tuning.py",
    "postprocess_workers": "does nothing without `postprocess`: tests/test_postprocess_runs.py",
    "postprocess_backend": "starts processes, which takes seconds: tests/test_postprocess_runs.py",
    "lengths": "needs batches of a tokenizer: tests/lengths/test_order.py",
    "bucket_lengths": "needs batches with a length: tests/lengths/test_buckets.py",
    "num_buckets": "needs batches with a length: tests/lengths/test_buckets.py",
    "bucket_multiple": "needs batches with a length: tests/lengths/test_buckets.py",
    "pad_spec": "needs batches with a length: tests/lengths/test_buckets.py",
    "warm_up": "needs batches with a length: tests/lengths/test_buckets.py",
    "group_by_length": "needs samples with a length: tests/lengths/test_order.py",
    "trace": "writes files: tests/observe/test_run.py",
}
"""Flags that side-by-side cases do not vary: why, and where they are compared with stock Lightning."""

Pair = frozenset[tuple[str, Any]]
"""Two flags, each with one of its values."""


def pairs(flags: Mapping[str, Any]) -> Iterator[Pair]:
    """Every two settings of a set of flags."""
    return map(frozenset, combinations(flags.items(), 2))


def pairwise(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Sets of flags in which every two values of two flags occur together. The defaults are the first set.

    Greedy and without chance. Each further set begins with a pair that is not covered yet; each other flag then takes
    the value that covers most pairs with those that are chosen already.
    """
    sets = [{name: choices[0] for name, choices in values.items()}]
    missing: dict[Pair, None] = dict.fromkeys(
        frozenset({(one, a), (other, b)})
        for one, other in combinations(values, 2)
        for a in values[one]
        for b in values[other]
    )
    _remove(missing, pairs(sets[0]))
    while missing:
        chosen = dict(next(iter(missing)))
        for name in values:
            if name not in chosen:
                chosen[name] = max(values[name], key=partial(_newly_covered, missing, chosen, name))
        sets.append({name: chosen[name] for name in values})
        _remove(missing, pairs(chosen))
    return sets


def _newly_covered(missing: Collection[Pair], chosen: Mapping[str, Any], name: str, value: Any) -> int:
    return sum(frozenset({(name, value), each}) in missing for each in chosen.items())


def _remove(missing: dict[Pair, None], covered: Iterable[Pair]) -> None:
    for pair in covered:
        missing.pop(pair, None)


SETS = pairwise(VALUES)


def changed(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the defaults."""
    return {name: value for name, value in flags.items() if value != VALUES[name][0]}
