"""What the plugin assumes of Habana's bridge, each assumption with the question that finds out."""

from collections.abc import Callable
from dataclasses import dataclass

from lightning_hpu_infer.verify.check import MODES, Check, Kind, Mode, Seen

NOTHING = "nothing: it costs speed only"


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """Something that the plugin takes for granted of the bridge."""

    name: str
    statement: str
    """One sentence."""
    source: str
    """Where it is from: a file of the bridge and its version."""
    turns_off: str
    """What a user has to set where it is broken."""
    modes: tuple[Mode, ...]
    """The modes in which the plugin relies on it."""
    ask: Callable[[], str]
    """Asks the device and returns what was seen. Raises `Broken` or `NotTried`."""

    def check(self) -> Check:
        """The check that asks."""
        return Check(
            kind=Kind.ASSUMPTION, name=self.name, run=lambda: Seen(self.ask()), turns_off=f"Set {self.turns_off}."
        )


ASSUMPTIONS: dict[str, Assumption] = {}
"""By name. They come in when the modules that ask are imported, which `catalogue` does."""


def assume(
    statement: str, *, source: str, turns_off: str, modes: tuple[Mode, ...] = MODES
) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Make the decorated question the check of an assumption, which gets the function's name.

    Args:
        statement: What is assumed, in one sentence.
        source: A file of the bridge and its version, or of this package.
        turns_off: What a user has to set where it is broken, such as "`hpu_graphs=False`".
        modes: Where the plugin relies on it.
    """

    def register(ask: Callable[[], str]) -> Callable[[], str]:
        name = ask.__name__.replace("_", " ")
        ASSUMPTIONS[name] = Assumption(
            name=name, statement=statement, source=source, turns_off=turns_off, modes=modes, ask=ask
        )
        return ask

    return register
