"""What is in a folder of predictions: complete or not, what is missing, and whether the files are sound."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lightning_hpu_infer.writing.manifest import File, Fingerprint, Manifest
from lightning_hpu_infer.writing.opening import positions
from lightning_hpu_infer.writing.read import manifests_at
from lightning_hpu_infer.writing.schemas import united
from lightning_hpu_infer.writing.storage import Storage, storage_at

DATASET_LENGTHS = "dataset lengths"
"""The fingerprint's entry with the samples of each dataloader's dataset, or null where nobody knows."""
_SHOWN = 8
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RankDescription:
    """What one rank has written."""

    rank: int
    complete: bool
    """Whether its latest run came to its end."""
    rows: int
    files: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is in a folder of predictions."""

    path: str
    complete: bool
    """Whether the latest run came to its end on all of its ranks."""
    rows: int
    ranks: list[RankDescription]
    columns: dict[str, str]
    """Types by name."""
    fingerprint: Fingerprint
    """What the run depended on."""
    missing: dict[int, list[tuple[int, int]]] | None
    """The samples of each dataloader's dataset that have no prediction: `(first, last + 1)` of each gap. Only datasets
    whose lengths are known; None if there is none."""
    repeated: dict[int, int]
    """Per dataloader, how many samples are there several times: what a sampler with replacement yields, or two runs at
    once have written."""
    problems: list[str]
    """Files that are lost or broken, in words."""
    verified: bool
    """Whether the files' contents were compared with their checksums, and not only their sizes."""

    @property
    def sound(self) -> bool:
        """Whether the run is complete and no problem was found."""
        return self.complete and not self.problems

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        state = "complete" if self.complete else "incomplete"
        lines = [f"{self.path}: {state}, {self.rows} rows"]
        for rank in self.ranks:
            state = "complete" if rank.complete else "incomplete"
            files = "1 file" if rank.files == 1 else f"{rank.files} files"
            lines.append(f"rank {rank.rank}: {state}, {rank.rows} rows in {files}, {rank.bytes} bytes")
        for loader, ranges in (self.missing or {}).items():
            if ranges:
                shown = [f"{start}-{stop - 1}" if stop - start > 1 else str(start) for start, stop in ranges[:_SHOWN]]
                more = [f"and {len(ranges) - _SHOWN} more"] if len(ranges) > _SHOWN else []
                count = sum(stop - start for start, stop in ranges)
                lines.append(f"missing of dataloader {loader}: {', '.join([*shown, *more])} ({count} samples)")
        lines += [f"several times of dataloader {loader}: {count} samples" for loader, count in self.repeated.items()]
        lines += [f"broken: {problem}" for problem in self.problems]
        return "\n".join(lines)


def describe(path: str | os.PathLike[str], verify: bool = False) -> Description:
    """Look at a folder of predictions. Nothing is changed.

    Args:
        path: A local folder or a URI, as the writer was given it.
        verify: Whether to read all files and compare their checksums.

    Raises:
        FileNotFoundError: If there are no predictions.
        ValueError: If a manifest is broken.
    """
    storage = storage_at(path)
    manifests = manifests_at(storage)
    broken = {id(file): text for each in manifests for file, text in _broken(storage, each, verify=verify)}
    found = _positions(storage, manifests, broken)
    problems = list(broken.values())
    try:
        schema = united(manifest.schema for manifest in manifests) or pa.schema([])
    except ValueError as error:
        schema = pa.schema([])
        problems.append(str(error))
    world = manifests[0].world
    finished = {manifest.rank for manifest in manifests if manifest.complete and manifest.world == world}
    return Description(
        path=os.fspath(path),
        complete=finished >= set(range(world)),
        rows=sum(manifest.rows for manifest in manifests),
        ranks=[
            RankDescription(
                rank=manifest.rank,
                complete=manifest.complete,
                rows=manifest.rows,
                files=len(manifest.files),
                bytes=sum(file.bytes for file in manifest.files),
            )
            for manifest in manifests
        ],
        columns={field.name: str(field.type) for field in schema},
        fingerprint=manifests[0].fingerprint,
        missing=_missing(manifests, found),
        repeated={loader: count for loader, indices in found.items() if (count := _repeated(indices))},
        problems=problems,
        verified=verify,
    )


def _broken(storage: Storage, manifest: Manifest, *, verify: bool) -> list[tuple[File, str]]:
    sizes = storage.names(manifest.folder)
    found = []
    for file in manifest.files:
        name = f"{manifest.folder}/{file.name}"
        if file.name not in sizes:
            found.append((file, f"{name} is missing"))
        elif sizes[file.name] != file.bytes:
            found.append((file, f"{name} has {sizes[file.name]} bytes, not {file.bytes}"))
        elif verify and _sha256(storage, name) != file.sha256:
            found.append((file, f"{name} has other contents than were written"))
    return found


def _sha256(storage: Storage, name: str) -> str:
    hashed = hashlib.sha256()
    with storage.open(name) as file:
        while data := file.read(_CHUNK):
            hashed.update(data)
    return hashed.hexdigest()


def _positions(storage: Storage, manifests: list[Manifest], broken: dict[int, str]) -> dict[int, NDArray[np.int64]]:
    """The samples that are there, per dataloader, in any order. A file that cannot be read is added to those broken."""
    found: dict[int, list[NDArray[np.int64]]] = {}
    for manifest in manifests:
        for file in manifest.files:
            if id(file) not in broken:
                try:
                    for loader, indices in positions(storage, manifest, file).items():
                        found.setdefault(loader, []).append(indices)
                except (OSError, ValueError) as error:
                    broken[id(file)] = str(error)
    return {loader: np.concatenate(parts) for loader, parts in sorted(found.items())}


def _repeated(indices: NDArray[np.int64]) -> int:
    return int((np.unique(indices, return_counts=True)[1] > 1).sum())


def _missing(manifests: list[Manifest], found: dict[int, NDArray[np.int64]]) -> dict[int, list[tuple[int, int]]] | None:
    lengths: Any = manifests[0].fingerprint.get(DATASET_LENGTHS)
    known = {loader: each for loader, each in enumerate(lengths or ()) if each is not None}
    if not known:
        return None
    return {loader: _gaps(found.get(loader, np.empty(0, np.int64)), length) for loader, length in known.items()}


def _gaps(indices: NDArray[np.int64], length: int) -> list[tuple[int, int]]:
    """The ranges of `range(length)` that are not among the indices."""
    there = np.unique(np.concatenate([indices, np.array([-1, length])]))
    there = there[there <= length]
    before = np.flatnonzero(np.diff(there) > 1)
    return [(int(there[at]) + 1, int(there[at + 1])) for at in before]
