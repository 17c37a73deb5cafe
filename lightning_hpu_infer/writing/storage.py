"""Where predictions are kept: a local folder or an object store, and the few operations on its files."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import fs


class _Raw(Protocol):
    def write(self, data: Any, /) -> Any: ...

    def close(self) -> None: ...


class Sink:
    """A file that is being written, which nobody sees before it is published. pyarrow writes into it.

    Its checksum is computed on the way.

    Args:
        raw: What takes the bytes.
        publish: Closes the file, and gives it its name.
        discard: Closes the file, and removes it.
        path: What errors of a disk name, which do not name it themselves.
    """

    closed = False
    """pyarrow asks. It is closed by `publish` and `discard` alone."""

    def __init__(
        self, raw: _Raw, publish: Callable[[], None], discard: Callable[[], None], path: Path | None = None
    ) -> None:
        self._raw = raw
        self._publish = publish
        self._path = path
        self._discard = discard
        self._discarded = False
        self._hash = hashlib.sha256()
        self.size = 0
        """Bytes written."""

    def publish(self) -> None:
        """Close the file, and give it its name."""
        with _naming(self._path):
            self._publish()

    def discard(self) -> None:
        """Close the file and remove it. What is written from now on is dropped."""
        self._discarded = True
        self._discard()

    @property
    def sha256(self) -> str:
        """Of what has been written, in hexadecimal digits."""
        return self._hash.hexdigest()

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        if self._discarded:
            return len(view)
        self._hash.update(view)
        written = 0
        with _naming(self._path):
            while written < len(view):  # An unbuffered file may take less than all.
                taken = self._raw.write(view[written:])
                written += len(view) - written if taken is None else taken
        self.size += written
        return written

    def tell(self) -> int:
        """Bytes written."""
        return self.size

    def flush(self) -> None:
        """Do nothing: `publish` does."""

    def close(self) -> None:
        """Do nothing: `publish` and `discard` do."""

    def readable(self) -> bool:
        """No."""
        return False

    def writable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """No."""
        return False


@contextmanager
def _naming(path: Path | None) -> Iterator[None]:
    """Let errors name the file: a full disk, for one, is told without it."""
    try:
        yield
    except OSError as error:
        if path is not None and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


class Storage:
    """A folder on an object store. A file is seen when it is closed, and then whole; there are no locks.

    Names are relative to the folder, with slashes.

    Args:
        files: The file system.
        base: The folder's path in it.
    """

    local: Path | None = None
    """The folder, if it is a local one."""

    def __init__(self, files: fs.FileSystem, base: str) -> None:
        self._files = files
        self._base = base.rstrip("/")

    def __str__(self) -> str:
        return self._base

    def create(self, name: str) -> Sink:
        """Begin a file. Whatever else has its name is replaced when it is published."""
        stream = self._files.open_output_stream(self._path(name))

        def discard() -> None:
            # To close a stream is to publish it: Arrow cannot abort one from Python (pyarrow 26).
            with suppress(OSError):
                stream.close()
            self.remove(name)

        return Sink(stream, stream.close, discard)

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, so that others see the old one or the new one."""
        sink = self.create(name)
        try:
            sink.write(data)
            sink.publish()
        except BaseException:
            with suppress(OSError):
                sink.discard()
            raise

    def get(self, name: str) -> bytes:
        """The contents of a file.

        Raises:
            FileNotFoundError: If there is none.
        """
        with self.open(name) as file:
            return bytes(file.read())

    def open(self, name: str) -> pa.NativeFile:
        """A file to read from, at any place.

        Raises:
            FileNotFoundError: If there is none.
        """
        return self._files.open_input_file(self._path(name))

    def names(self, folder: str = "") -> dict[str, int | None]:
        """What is in a folder: sizes of files in bytes, None for folders. Empty if there is no such folder."""
        path = self._path(folder)
        found = self._files.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return {
            info.base_name: None if info.type == fs.FileType.Directory else info.size
            for info in found
            if info.path.rstrip("/") != path.rstrip("/")  # Some stores have a file that stands for the folder.
        }

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def remove_folder(self, folder: str) -> None:
        """Remove a folder that is empty, and leave one that is not."""
        if not self.names(folder):
            with suppress(OSError):
                self._files.delete_dir(self._path(folder))

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base


class LocalStorage(Storage):
    """A local folder. What is published is on the disk, whatever happens to the machine afterwards.

    A file is written under another name, which ends in `.tmp` and begins with a dot. Then its contents are flushed to
    the disk, it is renamed, and the folder is flushed, as fsync(2) asks for.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(fs.LocalFileSystem(), str(path))
        self.local: Path = path

    def create(self, name: str) -> Sink:
        """Begin a file, in folders that are made for it."""
        final = self.local / name
        temporary = final.with_name(f".{final.name}.tmp")
        self._make(final.parent)
        file = open(temporary, "wb", buffering=0)  # noqa: SIM115  (closed by the sink)

        def publish() -> None:
            os.fsync(file.fileno())
            file.close()
            os.replace(temporary, final)
            _sync_folder(final.parent)

        def discard() -> None:
            file.close()
            with suppress(FileNotFoundError):
                os.unlink(temporary)

        return Sink(file, publish, discard, final)

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with suppress(FileNotFoundError):
            os.unlink(self.local / name)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder that is empty, and leave one that is not."""
        with suppress(OSError):
            os.rmdir(self.local / folder)

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make(folder.parent)
            with suppress(FileExistsError):
                os.mkdir(folder)
            _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_unreadable(file: str) -> Iterator[None]:
    """Let errors of Arrow about what a file holds name it, and say what to do.

    Raises:
        OSError: In place of such an error of a disk, or of Parquet.
        ValueError: In place of any other.
    """
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(
            f"{file} cannot be read: {error!r}. If it is damaged, remove it: the next run predicts its samples again."
        ) from error


def storage_at(path: str | os.PathLike[str]) -> Storage:
    """The storage that a path or URI names.

    Args:
        path: A local path, or a URI: those that Arrow knows (`file`, `s3`, `gs`, `abfs`, `hdfs`), with its options, and
            any other that fsspec knows.

    Raises:
        ValueError: If it is a URI that was made a `Path`, or one that nobody knows.
    """
    text = os.fspath(path)
    if not isinstance(path, str) and re.match(r"[a-z][a-z0-9+.-]+:/", text):
        raise ValueError(f"A URI is no path: {text!r} has lost a slash. Pass it as a string.")
    if "://" not in text:
        return LocalStorage(Path(text).expanduser().absolute())
    try:
        files, base = fs.FileSystem.from_uri(text)
    except pa.ArrowInvalid as error:
        if "nrecognized filesystem" not in str(error):
            raise
        files, base = _from_fsspec(text)
    return LocalStorage(Path(base)) if isinstance(files, fs.LocalFileSystem) else Storage(files, base)


def _from_fsspec(uri: str) -> tuple[fs.FileSystem, str]:
    from fsspec.core import url_to_fs  # beside torch, and slow to import

    files, base = url_to_fs(uri)
    return fs.PyFileSystem(fs.FSSpecHandler(files)), base
