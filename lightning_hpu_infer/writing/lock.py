"""One process per rank of a local folder."""

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCKS = ".locks"


def ranks_with_locks(folder: Path) -> list[int]:
    """The ranks whose files in a local folder somebody has kept others away from, now or before."""
    found = (path.stem.removeprefix("rank-") for path in (folder / LOCKS).glob("rank-*.lock"))
    return sorted(int(rank) for rank in found if rank.isdecimal())


class Lock:
    """Keeps others away from a rank's files until it is released, or the process has ended in whatever way.

    Args:
        folder: The local folder of the predictions.
        rank: Whose files.

    Raises:
        RuntimeError: If another process, or another run in this one, has it.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = folder / LOCKS / f"rank-{rank:05d}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        # A run may be ended by another thread than the one that began it.
        self._lock = FileLock(path, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RuntimeError(
                f"Another run writes predictions of rank {rank} to {folder}. Wait for its end, or choose another path."
            ) from error

    def release(self) -> None:
        """Let others in. May be called again."""
        with suppress(OSError):
            self._lock.release(force=True)
