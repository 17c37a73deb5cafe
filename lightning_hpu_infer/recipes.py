"""The bridge's disk cache of compiled recipes: what PT_HPU_RECIPE_CACHE_CONFIG asks for, and whether that can be."""

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

VARIABLE = "PT_HPU_RECIPE_CACHE_CONFIG"
FORMAT = (
    f"{VARIABLE}=FOLDER,DELETE,MEGABYTES,NFS, such as /var/tmp/recipes,false,4096; all but the folder may be left out"
)
_WORDS = {"1": True, "true": True, "0": False, "false": False}


class FolderState(str, Enum):
    """What the bridge can do with the folder of its recipes."""

    UNKNOWN = ""
    """No folder was looked at."""
    USABLE = "usable"
    """It is there and can be written to, or can be made, which the bridge does."""
    READ_ONLY = "read-only"
    IMPOSSIBLE = "impossible"
    """It is not there and cannot be made, or is no folder."""


@dataclass(frozen=True, kw_only=True)
class RecipeCache:
    """The fields of the variable, with the bridge's defaults."""

    folder: str = ""
    """Where recipes are kept; empty keeps none."""
    delete: bool = False
    """Whether the folder is emptied when a process starts."""
    megabytes: int = 0
    """Beyond this the oldest recipes are removed; 0 removes none (of bridge 1.19)."""
    nfs: bool = False
    """Whether the folder is on a network drive."""
    fields: int = 0
    """How many fields there are: bridge 1.19 takes three, Intel's current list of runtime variables has four."""


def parse(value: str) -> RecipeCache:
    """Read the variable's value as the bridge does (1.19 `recipe_cache_config.cpp`, `env_flags.cpp`).

    Raises:
        ValueError: If the bridge would refuse it. The message says which field is wrong.
    """
    fields = value.removesuffix(",").split(",")
    if len(fields) > 4:
        raise ValueError(f"it has {len(fields)} fields, and the bridge takes four at most")
    folder, delete, megabytes, nfs = fields + [""] * (4 - len(fields))
    if megabytes and not megabytes.isdecimal():
        raise ValueError(f"its third field, megabytes, is {megabytes!r} and no number")
    return RecipeCache(
        folder=folder,
        delete=_truth("second", "delete", delete),
        megabytes=int(megabytes or 0),
        nfs=_truth("fourth", "NFS", nfs),
        fields=len(fields),
    )


def folder_state(folder: str) -> FolderState:
    """Look at the folder, without making it. The bridge makes it with its parents (1.19 `recipe_cache.cpp`)."""
    path = Path(folder).absolute()
    if path.is_dir():
        return FolderState.USABLE if os.access(path, os.W_OK | os.X_OK) else FolderState.READ_ONLY
    there = next(each for each in (path, *path.parents) if each.exists())
    can_be_made = there != path and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return FolderState.USABLE if can_be_made else FolderState.IMPOSSIBLE


def _truth(place: str, name: str, word: str) -> bool:
    if word.lower() not in ("", *_WORDS):
        raise ValueError(f"its {place} field, {name}, is {word!r} and neither true nor false")
    return _WORDS.get(word.lower(), False)
