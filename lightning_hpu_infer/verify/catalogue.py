"""All checks of a mode, in the order in which they run."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from lightning_hpu_infer.verify import about_copies, about_device, about_graphs, changes, techniques, timing
from lightning_hpu_infer.verify.assumptions import ASSUMPTIONS, Assumption
from lightning_hpu_infer.verify.check import MODES, Check, Mode

_ASKING = [module.__name__ for module in (about_device, about_copies, about_graphs)]
"""The modules that ask, in that order: importing them registers their assumptions."""


def assumptions(mode: Mode | None = None) -> Iterator[Assumption]:
    """The assumptions of a mode.

    Args:
        mode: None for those of both.
    """
    ordered = sorted(ASSUMPTIONS.values(), key=lambda each: _ASKING.index(each.ask.__module__))
    return (each for each in ordered if mode is None or mode in each.modes)


def checks(mode: Mode, *, quick: bool = False, only: Sequence[str] = ()) -> list[Check]:
    """The checks of a mode, those of the least that everything else stands on first.

    Args:
        mode: The mode.
        quick: All assumptions, and a few of the others.
        only: Parts of ids, or patterns with `*`; no others if there are any.
    """
    found = [each.check() for each in assumptions(mode)]
    for module in (techniques, changes, timing):
        found += module.checks(quick=quick)
    return [check for check in found if is_chosen(check.id, only)]


def is_chosen(name: str, only: Sequence[str]) -> bool:
    """Whether a check is wanted.

    Args:
        name: Its id.
        only: Parts of ids, or patterns; empty for all.
    """
    return not only or any(fnmatchcase(name, f"*{pattern}*") for pattern in only)


def check_patterns(only: Sequence[str]) -> None:
    """Check that each pattern chooses something in some mode.

    Raises:
        ValueError: If one does not.
    """
    ids = {check.id for mode in MODES for check in checks(mode)}
    for pattern in only:
        if not any(is_chosen(name, [pattern]) for name in ids):
            raise ValueError(
                f"no check is called {pattern!r}. Names are like {sorted(ids)[0]!r}; * stands for any text."
            )
