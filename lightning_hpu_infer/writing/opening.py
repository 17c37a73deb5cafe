"""Opens a folder of predictions for a rank: what is there is checked, cleaned up, and told to who goes on with it."""

import json
import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from lightning_hpu_infer.writing.lock import Lock, ranks_with_locks
from lightning_hpu_infer.writing.manifest import (
    MANIFEST,
    File,
    Fingerprint,
    Manifest,
    all_manifests,
    folder_of,
    ranks_in,
)
from lightning_hpu_infer.writing.ranges import indices_of
from lightning_hpu_infer.writing.schemas import INDEX, LOADER, united
from lightning_hpu_infer.writing.shards import Shards, is_ours
from lightning_hpu_infer.writing.storage import Storage, naming_unreadable, storage_at

T = TypeVar("T")


@dataclass(kw_only=True)
class Opened:
    """A folder of predictions that a rank writes to."""

    storage: Storage
    manifest: Manifest
    """The rank's, with the files of earlier runs."""
    done: dict[int, NDArray[np.int64]]
    """The samples that any rank has committed: positions per dataloader, sorted, each as often as it is there."""
    schema: pa.Schema | None
    """Of what is there, over all ranks; None if there is nothing. For `Columns`."""
    _locks: ExitStack = field(repr=False)

    def shards(self, **options: Any) -> Shards:
        """What writes the rank's files, with the options of `Shards`. Once."""
        return Shards(self.storage, self.manifest, **options)

    def release(self) -> None:
        """Let another run in. May be called again."""
        self._locks.close()


def open_path(
    path: str | os.PathLike[str],
    rank: int,
    world: int,
    *,
    fingerprint: Fingerprint,
    resume: bool = True,
    overwrite: bool = False,
    agree: Callable[[bool], bool] = bool,
) -> Opened:
    """Open a folder of predictions for a rank, which all ranks of the run do at once.

    Args:
        path: A local folder or a URI; see `storage_at`.
        rank: This process's, from 0.
        world: How many there are.
        fingerprint: What the run depends on. If predictions are there, they have to be of the same.
        resume: Whether to go on if predictions are there.
        overwrite: Whether to remove them first. Only what such runs write is removed.
        agree: Waits for all ranks, and tells whether what each of them gave is true.

    Raises:
        FileExistsError: If the folder holds something else; or predictions, and neither `resume` nor `overwrite` is
            set.
        RuntimeError: If another run writes to it, or any of this happens to another rank.
        ValueError: If the predictions that are there are of another fingerprint, or of types that do not go together.
    """
    storage = storage_at(path)
    locks = ExitStack()

    def enter() -> None:
        _refuse_others(storage)
        if storage.local is not None:
            # When ranks of a run are killed, others of it may go on to write.
            left = [other for other in ranks_with_locks(storage.local) if other >= world] if rank == 0 else []
            for each in (rank, *left):
                locks.callback(Lock(storage.local, each).release)

    def clear() -> None:
        if overwrite and rank == 0:
            _remove(storage)

    def begin() -> Manifest:
        here = json.loads(json.dumps(fingerprint))
        _compare(all_manifests(storage), here, storage, resume=resume)
        manifest = _own(storage, rank, world, here)
        if rank == 0:
            _tidy_others(storage, world)
        return manifest

    def look() -> tuple[pa.Schema | None, dict[int, NDArray[np.int64]]]:
        manifests = all_manifests(storage)
        return united(each.schema for each in manifests), _done(storage, manifests)

    together = partial(_together, agree, path)
    try:
        together(enter)
        together(clear)
        manifest = together(begin)
        schema, done = together(look)  # Nobody commits before all have looked.
    except BaseException:
        locks.close()
        raise
    return Opened(storage=storage, manifest=manifest, done=done, schema=schema, _locks=locks)


def _together(agree: Callable[[bool], bool], path: object, part: Callable[[], T]) -> T:
    """Do a part of the opening, and wait until all ranks have done it. If one cannot, none goes on."""
    try:
        result = part()
    except Exception:
        agree(False)
        raise
    if not agree(True):
        raise RuntimeError(f"Another rank could not open {path}, so nothing is predicted. Its error says why.")
    return result


def _refuse_others(storage: Storage) -> None:
    """Refuse a folder in which there is something, and not predictions."""
    found = storage.names()
    names = [name for name in found if not name.startswith(".")]
    if names and not any(_is_ours(storage, folder_of(rank)) for rank in ranks_in(found)):
        shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise FileExistsError(
            f"{storage} holds no predictions but other files ({shown}). Choose a folder of their own."
        )


def _is_ours(storage: Storage, folder: str) -> bool:
    """Whether a folder has the manifest of a rank; or nothing in it yet but what comes before one."""
    names = storage.names(folder)
    return MANIFEST in names or all(name.startswith(".") and is_ours(name) for name in names)


def _remove(storage: Storage) -> None:
    """Remove all predictions. A run that is killed here leaves manifests of files that are there, or of none."""
    for rank, folder in _folders(storage):
        manifest = None
        with suppress(ValueError):  # It cannot be read, by anybody.
            manifest = Manifest.load(storage, rank)
        if manifest is not None:
            replace(manifest, files=[], complete=False).store(storage)
        _remove_unlisted(storage, folder, [])
        storage.remove(f"{folder}/{MANIFEST}")
        storage.remove_folder(folder)


def _folders(storage: Storage) -> list[tuple[int, str]]:
    """The ranks that have a folder with what runs write, and its name."""
    found = ((rank, folder_of(rank)) for rank in ranks_in(storage.names()))
    return [(rank, name) for rank, name in found if _is_ours(storage, name)]


def _compare(manifests: list[Manifest], fingerprint: Fingerprint, storage: Storage, *, resume: bool) -> None:
    written = [manifest for manifest in manifests if manifest.files]
    if written and not resume:
        rows = sum(manifest.rows for manifest in written)
        raise FileExistsError(
            f"{storage} holds predictions of {rows} samples. Pass `resume=True` to go on with them, `overwrite=True` to"
            " remove them, or another path."
        )
    missing = object()
    for manifest in written:
        for name in dict.fromkeys([*manifest.fingerprint, *fingerprint]):
            there, here = manifest.fingerprint.get(name, missing), fingerprint.get(name, missing)
            if there != here:
                texts = ["nothing" if value is missing else _short(value) for value in (there, here)]
                raise ValueError(
                    f"The predictions in {storage} are of another run: {name} was {texts[0]} and is {texts[1]}. Pass"
                    " `overwrite=True` to remove them, or another path."
                )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"


def _own(storage: Storage, rank: int, world: int, fingerprint: Fingerprint) -> Manifest:
    """The rank's manifest, of what is really there, stored for this run; what is not listed is removed."""
    earlier = Manifest.load(storage, rank) or Manifest(rank=rank, world=world, fingerprint=fingerprint)
    files = _sound(storage, earlier)
    schema = earlier.schema if files else None
    manifest = Manifest(rank=rank, world=world, fingerprint=fingerprint, schema=schema, files=files)
    manifest.store(storage)
    _remove_unlisted(storage, manifest.folder, files)
    return manifest


def _tidy_others(storage: Storage, world: int) -> None:
    """The same for ranks that this run does not have. Their folders stay if predictions are in them."""
    for rank, folder in _folders(storage):
        if rank < world:
            continue
        manifest = Manifest.load(storage, rank)
        files = [] if manifest is None else _sound(storage, manifest)
        if manifest is not None and files:
            if files != manifest.files:
                manifest.files = files
                manifest.store(storage)
        else:
            storage.remove(f"{folder}/{MANIFEST}")
        _remove_unlisted(storage, folder, files)
        storage.remove_folder(folder)


def _sound(storage: Storage, manifest: Manifest) -> list[File]:
    """The listed files that are there in their size."""
    sizes = storage.names(manifest.folder)
    sound = [file for file in manifest.files if sizes.get(file.name) == file.bytes]
    for file in manifest.files:
        if file not in sound:
            found = f"has {sizes[file.name]} bytes, not {file.bytes}" if file.name in sizes else "is missing"
            warnings.warn(
                f"{storage}/{manifest.folder}/{file.name} {found}. Its {file.rows} samples are predicted again.",
                stacklevel=2,
            )
    return sound


def _remove_unlisted(storage: Storage, folder: str, files: list[File]) -> None:
    """Remove what killed runs have left: temporary files, and files that they did not come to list."""
    listed = {file.name for file in files} | {MANIFEST}
    for name, size in storage.names(folder).items():
        if size is not None and is_ours(name) and name not in listed:
            storage.remove(f"{folder}/{name}")


def _done(storage: Storage, manifests: list[Manifest]) -> dict[int, NDArray[np.int64]]:
    found: dict[int, list[NDArray[np.int64]]] = {}
    for manifest in manifests:
        for file in manifest.files:
            for loader, indices in positions(storage, manifest, file).items():
                found.setdefault(loader, []).append(indices)
    return {loader: np.sort(np.concatenate(parts)) for loader, parts in sorted(found.items())}


def positions(storage: Storage, manifest: Manifest, file: File) -> dict[int, NDArray[np.int64]]:
    """The samples in a file: their positions per dataloader, in any order."""
    if file.indices is not None:
        return {loader: indices_of(ranges) for loader, ranges in file.indices.items()}
    name = f"{manifest.folder}/{file.name}"
    with storage.open(name) as opened, naming_unreadable(f"{storage}/{name}"):
        table = parquet.read_table(opened, columns=[INDEX, LOADER])
        indices, loaders = table[INDEX].to_numpy(), table[LOADER].to_numpy()
    return {int(loader): indices[loaders == loader] for loader in np.unique(loaders)}
