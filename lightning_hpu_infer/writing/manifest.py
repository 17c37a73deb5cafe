"""What a rank has written: the list of its files, and of what run they are. Replaced as a whole, at each file."""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from lightning_hpu_infer.writing.ranges import Ranges
from lightning_hpu_infer.writing.storage import Storage

FORMAT = "lightning_hpu_infer predictions"
VERSION = 1
MANIFEST = "_manifest.json"
"""Readers of whole folders, such as pandas and Spark, pass over names that begin with an underscore or a dot."""

Fingerprint = dict[str, Any]
"""What a run depends on, as values of JSON by name."""

Stretch = list[int]
"""Whole batches of a stream: `[first row, last row + 1, last batch + 1]`, counted from the stream's beginning."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file that is written and whole."""

    name: str
    """In the rank's folder."""
    rows: int
    bytes: int
    sha256: str
    indices: dict[int, Ranges] | None
    """The samples in it, per dataloader; None if they are no few ranges: the file's columns tell then."""
    streams: dict[int, list[Stretch]] = field(default_factory=dict)
    """Per dataloader whose samples have no indices, what it has of the rank's stream."""


@dataclass(kw_only=True)
class Manifest:
    """A rank's files, and the run that wrote them."""

    rank: int
    world: int
    """Ranks of the latest run."""
    fingerprint: Fingerprint
    schema: pa.Schema | None = None
    files: list[File] = field(default_factory=list)
    complete: bool = False
    """Whether the rank's latest run came to its end."""

    @property
    def folder(self) -> str:
        """Where the files are."""
        return folder_of(self.rank)

    @property
    def rows(self) -> int:
        """Of all files."""
        return sum(file.rows for file in self.files)

    def start_of(self, loader: int) -> tuple[int, int]:
        """Where a stream goes on: how many of its rows and batches are there, up to the first one that is not."""
        found = [stretch for file in self.files for stretch in file.streams.get(loader, ())]
        ends = {first: (stop, batches) for first, stop, batches in found}
        rows, batches = 0, 0
        while (end := ends.get(rows, (0, 0)))[0] > rows:
            rows, batches = end
        return rows, batches

    def store(self, storage: Storage) -> None:
        """Write it, in place of the one before."""
        storage.put(f"{self.folder}/{MANIFEST}", self.to_json().encode())

    def to_json(self) -> str:
        """The file's text."""
        schema = self.schema
        values = {
            "format": FORMAT,
            "version": VERSION,
            "rank": self.rank,
            "world": self.world,
            "complete": self.complete,
            "fingerprint": self.fingerprint,
            "columns": None if schema is None else {each.name: str(each.type) for each in schema},
            "schema": None if schema is None else base64.b64encode(schema.serialize()).decode(),
            "files": [vars(file) for file in self.files],
        }
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def load(cls, storage: Storage, rank: int) -> "Manifest | None":
        """A rank's manifest; None if it has none.

        Raises:
            ValueError: If it is not one of ours, or of a newer version.
        """
        name = f"{folder_of(rank)}/{MANIFEST}"
        try:
            text = storage.get(name)
        except FileNotFoundError:
            return None
        folder = f"{storage}/{folder_of(rank)}"
        remedy = f"Remove {folder} to have its samples predicted again, or pass `overwrite=True` to begin anew."
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise KeyError(values["format"])
            manifest = cls._of(rank, values) if values["version"] <= VERSION else None
        except Exception as error:  # Whatever a disk makes of it.
            raise ValueError(f"{folder}/{MANIFEST} is no manifest of predictions: {error!r}. {remedy}") from error
        if values.get("rank", rank) != rank:
            raise ValueError(
                f"{folder} is a copy of rank {values['rank']}, whose samples would be there twice. Remove {folder}."
            )
        if manifest is None:
            raise ValueError(
                f"{folder}/{MANIFEST} is of version {values['version']}, and this is known up to {VERSION}. Update"
                f" lightning-hpu-infer. {remedy}"
            )
        return manifest

    @classmethod
    def _of(cls, rank: int, values: dict[str, Any]) -> "Manifest":
        schema = values["schema"]
        return cls(
            rank=rank,
            world=values["world"],
            fingerprint=values["fingerprint"],
            schema=None if schema is None else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(schema))),
            files=[_file(each) for each in values["files"]],
            complete=values["complete"],
        )


def _file(values: dict[str, Any]) -> File:
    indices = values["indices"]
    by_loader = None if indices is None else {int(loader): ranges for loader, ranges in indices.items()}
    streams = {int(loader): stretches for loader, stretches in values.get("streams", {}).items()}
    return File(**(values | {"indices": by_loader, "streams": streams}))


def folder_of(rank: int) -> str:
    """The folder of a rank's files."""
    return f"rank-{rank:05d}"


def ranks_in(names: Mapping[str, int | None]) -> list[int]:
    """The ranks that have a folder among these names, as `Storage.names` tells them."""
    folders = [name for name, size in names.items() if size is None and re.fullmatch(r"rank-[0-9]{5,}", name)]
    ranks = ((int(name.removeprefix("rank-")), name) for name in folders)
    return sorted(rank for rank, name in ranks if name == folder_of(rank))


def all_manifests(storage: Storage) -> list[Manifest]:
    """The manifests of all ranks, by rank."""
    found = (Manifest.load(storage, rank) for rank in ranks_in(storage.names()))
    return [manifest for manifest in found if manifest is not None]
