"""The callback that writes predictions to disk as they come, and lets a run go on where an earlier one stopped."""

import os
import signal
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_hpu_infer._lightning import note_sigterm_alone
from lightning_hpu_infer.observer import Observer
from lightning_hpu_infer.samples import Done
from lightning_hpu_infer.writing import check_columns, check_pyarrow

if TYPE_CHECKING:
    from lightning_hpu_infer.writing.session import Session


class PredictionWriter(BasePredictionWriter):
    """Writes predictions to Parquet files while they are made, each sample once, and goes on where a run stopped.

    Predictions are handed to a thread, which writes them. What is written is committed every `rows_per_file` rows or
    `seconds_per_file` seconds, and at the end of the run, be it by an error or Ctrl-C: a file then has its name and is
    listed. Read them by `read_predictions` and `iter_predictions`, or as plain Parquet files (`PATH/**/*.parquet`).

    With `HPUInferenceAccelerator`, the same script started again predicts only what is not committed yet, whatever its
    batch size, number of devices or workers, or order of length. With another accelerator all is predicted again, and
    what is committed is not written twice. Main thread only.

    On SIGTERM, which clusters send before they end a job, a run ends before its next batch: what was launched is
    completed and committed, and the process exits with 143, unless the script catches `SystemExit`.

    Args:
        path: A local folder, or a URI that Arrow or fsspec knows, such as `s3://bucket/folder`.
        resume: Whether to go on if predictions are there. If not, that is an error.
        overwrite: Whether to remove predictions that are there first. Nothing else in the folder is removed.
        columns: Which parts of a prediction become columns: their names, or a mapping from those to other names. All
            by default. A tensor, or a list of values, is the column `prediction`.
        rows_per_file: Rows after which a file is committed.
        seconds_per_file: Seconds after which it is, so that slow runs lose little.
        compression: A codec of Parquet: "zstd", "snappy", "gzip", "lz4", "brotli", "none".
        queue_bytes: Bytes of predictions that may wait for the thread. A run waits when there are more.
        id_key: Name of the batch's part that has an id for each sample, for the column `id`.

    Raises:
        ImportError: If pyarrow is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If a number is not positive, there are no columns, or nobody knows the codec.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume: bool = True,
        overwrite: bool = False,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        rows_per_file: int = 1_000_000,
        seconds_per_file: float = 60.0,
        compression: str = "zstd",
        queue_bytes: int = 256 << 20,
        id_key: str | None = None,
    ) -> None:
        super().__init__("batch")
        check_pyarrow()
        check_columns(columns)
        _check_codec(compression)
        for name, value, kind in (
            ("rows_per_file", rows_per_file, Integral),
            ("seconds_per_file", seconds_per_file, Real),
            ("queue_bytes", queue_bytes, Integral),
        ):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"`{name}` must be {'an integer' if kind is Integral else 'a number'}, got {value!r}.")
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value!r}.")
        self.path = path
        self.resume = resume
        self.overwrite = overwrite
        self.columns = columns
        self.rows_per_file = rows_per_file
        self.seconds_per_file = seconds_per_file
        self.compression = compression
        self.queue_bytes = queue_bytes
        self.id_key = id_key
        self._session: Session | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no run."""
        return vars(self) | {"_session": None}

    # Of the loop

    def begin(
        self, trainer: Trainer, loaders: Sequence[object], *, skips: bool = True, observer: Observer | None = None
    ) -> Done:
        """Open the folder for a run, before its first batch.

        Args:
            trainer: Whose run begins. Its module has the weights that it predicts with.
            loaders: Its dataloaders, as Lightning has made them for prediction.
            skips: Whether the loop leaves out the samples that are done.
            observer: Is told when the thread writes.

        Returns:
            The samples, and batches of streams, that the loop may leave out.

        Raises:
            FileExistsError: If the folder holds something else; or predictions, and `resume` is False.
            RuntimeError: If another run writes to it.
            ValueError: If the predictions that are there were made with other weights, datasets or steps.
        """
        from lightning_hpu_infer.writing.session import Session  # needs pyarrow

        self._abandon()
        note_sigterm_alone(trainer)
        self._session = Session(self, trainer, loaders, skips=skips, observer=observer or Observer())
        if count := sum(map(len, self._session.committed.values())):
            again = "predicted, but not written, again: `HPUInferenceAccelerator` with one writer leaves them out"
            what = "left out" if skips else again
            rank_zero_info(f"{self.path} has predictions of {count} samples from an earlier run. They are {what}.")
        return self._session.done

    def _abandon(self) -> None:
        """End a run that did not come to its end: what it has predicted is committed."""
        session, self._session = self._session, None
        if session is None:
            return
        try:
            session.close(complete=False)
        except Exception as error:
            # Another error is on its way, or was raised already.
            rank_zero_warn(f"Some of the last predictions are not written to {self.path}: {error!r}")

    # Hooks

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the folder, if the loop has not."""
        if self._session is None:
            loaders: Any = trainer.predict_dataloaders
            self.begin(trainer, loaders if isinstance(loaders, list | tuple) else [loaders], skips=False)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End the run if SIGTERM has come. The loop completes what it has launched first.

        Raises:
            SIGTERMException: A `SystemExit` with the code that shells give to a process that SIGTERM has ended.
        """
        if trainer.received_sigterm:
            rank_zero_info(f"SIGTERM: the run ends, and what was predicted is written to {self.path}.")
            raise SIGTERMException(128 + signal.SIGTERM)

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Hand a batch's prediction to the thread; wait while too many bytes wait for it.

        Raises:
            Exception: What went wrong in the thread with an earlier batch.
        """
        assert self._session is not None, "`on_predict_start` has opened it"
        self._session.add(prediction, batch_indices, batch, batch_idx, dataloader_idx)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what waits, commit it, and let others use the folder.

        Raises:
            Exception: What went wrong in the thread.
        """
        session, self._session = self._session, None
        if session is not None:
            session.close(complete=True)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Commit what was predicted before an error, or Ctrl-C."""
        self._abandon()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Commit what a run that ended otherwise has left."""
        self._abandon()


def _check_codec(compression: str) -> None:
    from pyarrow import Codec

    known = [*(name for name in ("zstd", "snappy", "gzip", "lz4", "brotli") if Codec.is_available(name)), "none"]
    if not isinstance(compression, str) or compression.lower() not in known:
        raise ValueError(f"`compression` must be one of {', '.join(map(repr, known))}, got {compression!r}.")


def begin_writing(trainer: Any, loaders: Sequence[object], observer: Observer) -> Done | None:
    """Open the folder of the run's writer, if it has one.

    Args:
        trainer: The `Trainer` whose run begins.
        loaders: Its dataloaders, as Lightning has made them for prediction.
        observer: Is told when the writer's thread writes.

    Returns:
        What the run is to leave out; None for nothing. With several writers, which may lack different samples,
        none are left out, and each writes what it lacks.
    """
    writers = [callback for callback in trainer.callbacks if isinstance(callback, PredictionWriter)]
    done = [writer.begin(trainer, loaders, skips=len(writers) == 1, observer=observer) for writer in writers]
    return done[0] if len(done) == 1 else None
