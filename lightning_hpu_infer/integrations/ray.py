"""Ray Data: an actor that keeps its device busy, and a dataset with predictions beside its rows.

Checked with Ray 2.60.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.ahead import reason_against
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.integrations.tables import Table, beside, check_columns, pieces, tensors
from lightning_hpu_infer.pipeline import InferencePipeline

if TYPE_CHECKING:
    from ray.data import Dataset

CALLS = 2
"""Calls of an actor at once: while one returns its last batches, the other has launched its first."""
BATCHES_PER_TASK = 64
DEPTH = 3
"""`in_flight` and `prefetch` on an HPU where neither is given."""


class Predictor:
    """A class for `ray.data.Dataset.map_batches`, which returns the rows it gets with predictions beside them.

    It is called with any number of rows, cuts them into batches and has several in flight, within a call and over
    concurrent calls. Results come in the order of the rows. The rows come back in the format in which they came.

    Args:
        factory: Makes the module, which takes a batch and returns tensors, or a LightningModule with a `predict_step`.
            Called once per actor, in the thread that has the device. It is pickled, so it should load weights rather
            than hold them.
        batch_size: Rows of a batch for the module, 1 or more. None takes all rows of a call.
        preprocess: Turns rows into a batch for the module, such as a tokenizer; by default they become a dict, columns
            of numbers as tensors and all others as lists, as their types say. Runs beside the device, in two threads at
            once by `predict_dataset`.
        columns: The columns that are returned beside the predictions; None means all.
        config: The flags of the pipeline. Its `postprocess` makes what is stored of an output. `in_flight` and
            `prefetch` are 3 on an HPU unless one of them is given. If a batch may depend on earlier steps, as it may
            where a LightningModule has an `on_before_batch_transfer`, it is prepared when the one before it has its
            result, over all calls; `prefetch` is for those who know that it does not.
        device: An HPU if the process has one, else the CPU.

    Raises:
        Exception: What the factory raises.
        ValueError: If `batch_size` is out of its range, `columns` is no list, or `config` has an option that needs a
            Trainer.
    """

    def __init__(
        self,
        factory: Callable[[], nn.Module],
        *,
        batch_size: int | None = None,
        preprocess: Callable[[Table], Any] | None = None,
        columns: Sequence[str] | None = None,
        config: InferenceConfig | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 or more, or None, got {batch_size!r}.")
        check_columns(columns)
        self._batch_size = batch_size
        self._preprocess = preprocess or tensors
        self._columns = columns
        config = config or InferenceConfig()
        asked = config.prefetch
        device = torch.device(device or (_habana.DEVICE_TYPE if _habana.is_available() else "cpu"))
        kind = device.type
        if config.in_flight is None and config.prefetch is None and config.tunes_depths(kind):
            # Depths rise within a run, and calls are none. Nobody waits for a single batch here.
            config = replace(config, in_flight=DEPTH, prefetch=DEPTH)
        self._ahead = config.in_flight_depth(kind) + max(1, config.prefetch_depth(kind))
        self._pipeline = InferencePipeline(factory, device, config)
        self._turn: threading.Lock | None = None
        if not asked and (reason := reason_against([self._preprocess], [self._pipeline.module])):
            rank_zero_info(f"No batch is prepared ahead, since {reason}. Pass `prefetch={DEPTH}` if it may be.")
            self._turn = threading.Lock()

    def __call__(self, table: Table) -> Iterator[Table]:
        """The rows with predictions, in pieces of `batch_size`, while later ones are computed.

        Raises:
            ValueError: If a prediction has not one entry per row, a column's name is missing or taken, or a column of
                numbers has empty places and there is no `preprocess`.
        """
        if (turn := self._turn) is not None:
            for piece in pieces(table, self._batch_size):
                with turn:
                    result = self._result(piece, self._pipeline.submit(self._preprocess(piece)))
                yield result
            return
        submitted: deque[tuple[Table, Future[Any]]] = deque()
        for piece in pieces(table, self._batch_size):
            submitted.append((piece, self._pipeline.submit(self._preprocess(piece))))
            if len(submitted) > self._ahead:
                yield self._result(*submitted.popleft())
        while submitted:
            yield self._result(*submitted.popleft())

    def close(self) -> None:
        """Finish what was begun and give the device back. Ray need not call it: it drops the object at the end."""
        self._pipeline.close()

    def _result(self, piece: Table, output: "Future[Any]") -> Table:
        return beside(piece, output.result(), self._columns)


def predict_dataset(
    dataset: "Dataset",
    factory: Callable[[], nn.Module],
    *,
    concurrency: int | tuple[int, int],
    batch_size: int,
    preprocess: Callable[[Table], Any] | None = None,
    columns: Sequence[str] | None = None,
    config: InferenceConfig | None = None,
    batch_format: Literal["numpy", "pyarrow", "pandas"] | None = None,
    rows_per_task: int | Literal["auto"] | None = "auto",
    preserve_order: bool | None = None,
    id_column: str | None = None,
    checkpoint: "str | PathLike[str] | None" = None,
    num_cpus: float = 1,
    resources: dict[str, float] | None = None,
    runtime_env: dict[str, Any] | None = None,
) -> "Dataset":
    """A dataset with predictions beside its rows. Lazy, as all of Ray Data: write it, or iterate over it.

    Args:
        dataset: The rows.
        factory: As `Predictor`'s.
        concurrency: Actors, 1 or more, or the least and the most of them.
        batch_size: Rows of a batch for the module.
        preprocess: As `Predictor`'s.
        columns: As `Predictor`'s.
        config: As `Predictor`'s.
        batch_format: What `preprocess` gets: a dict of arrays, a `pyarrow.Table` or a `pandas.DataFrame`. None means
            "numpy", or without `preprocess` "pyarrow", which alone shows empty places as what they are.
        rows_per_task: Rows that an actor gets at once, a multiple of `batch_size`, which are computed again if it dies.
            "auto" means 64 batches. All tasks but the last get as many, so that a graph of one shape suffices. None
            leaves the dataset's blocks as they are.
        preserve_order: Whether the rows come back in their order; None leaves Ray's setting, which is no. Within a
            task they always do.
        id_column: The column with each row's name, unique in the dataset. Needed with `checkpoint`.
        checkpoint: A folder that all machines see, or a URI of an object store, in which Ray notes which rows are
            written. A later run with the same folder reads, computes and writes only the others. Used where the dataset
            is written to files.
        num_cpus: CPUs of an actor, for `preprocess`, or for the module where there is no HPU. Ray needs one more for
            its own tasks, and with `checkpoint` another one.
        resources: Other resources of an actor. None means one HPU where the cluster has any.
        runtime_env: Ray's environment for actors, such as `{"env_vars": {"PT_HPU_LAZY_MODE": "1"}}`.

    Returns:
        A dataset with the columns to keep and those of the predictions.

    Raises:
        ValueError: If a number is out of its range, `columns` is no list, one of `id_column` and `checkpoint` is
            missing, the ids are not kept, the dataset is one for which Ray has no checkpoints, or the cluster has too
            few CPUs, or other resources for one actor.
    """
    import ray
    from ray.data import ActorPoolStrategy
    from ray.data.checkpoint import CheckpointConfig

    check_columns(columns)
    if (id_column is None) != (checkpoint is None):
        raise ValueError(
            f"`id_column` and `checkpoint` go together, got {id_column!r} and {checkpoint!r}: rows that are done are"
            " found by their names."
        )
    if id_column is not None and columns is not None and id_column not in columns:
        raise ValueError(
            f"`columns` must have the `id_column`, {id_column!r}, got {list(columns)}: Ray notes the ids of the rows"
            " that it writes."
        )
    if checkpoint is not None and not _is_read(dataset._logical_plan.dag):
        raise ValueError(
            "`checkpoint` needs a dataset that Ray reads, such as `ray.data.read_parquet(...)`: of any other all rows"
            " would be computed and written again. Write them to files first, or leave `checkpoint` out."
        )
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be 1 or more, got {batch_size!r}.")
    rows = batch_size * BATCHES_PER_TASK if rows_per_task == "auto" else rows_per_task
    if rows is not None and (rows < 1 or rows % batch_size):
        raise ValueError(
            f"`rows_per_task` must be a multiple of `batch_size`, {batch_size}, got {rows!r}: the rest would be a batch"
            " of another shape in each task."
        )
    least, most = _actors(concurrency)
    found = ray.cluster_resources()  # type: ignore[no-untyped-call]
    if resources is None:
        resources = {"HPU": 1} if found.get("HPU") else {}
    _check_actor({"CPU": num_cpus, **resources}, found)
    if rows is not None or checkpoint is not None:
        _check_cpus(least, num_cpus, filters=checkpoint is not None, found=found.get("CPU", 0))
    if rows is not None:
        # Strictly, or the end of each block would be a batch, and a graph, of a shape of its own.
        dataset = dataset.repartition(target_num_rows_per_block=rows, strict=True)
    predicted = dataset.map_batches(
        Predictor,
        batch_size=None,
        batch_format=batch_format or ("numpy" if preprocess else "pyarrow"),
        compute=ActorPoolStrategy(
            min_size=least, max_size=most, max_concurrent_calls_per_actor=CALLS, enable_true_multi_threading=True
        ),
        fn_constructor_args=(factory,),
        fn_constructor_kwargs={
            "batch_size": batch_size,
            "preprocess": preprocess,
            "columns": columns,
            "config": config,
            "device": "hpu" if resources.get("HPU") else None,
        },
        num_cpus=num_cpus,
        resources=resources,
        runtime_env=runtime_env,
        udf_modifying_row_count=False,
    )
    if preserve_order is not None:
        predicted.context.execution_options.preserve_order = preserve_order
    if checkpoint is not None:
        # Kept on success: a run after it would write all rows again beside those that are there.
        predicted.context.checkpoint_config = CheckpointConfig(
            id_column, fspath(checkpoint), delete_checkpoint_on_success=False
        )
    return predicted


def _actors(concurrency: Any) -> tuple[int, int]:
    """The least and the most actors."""
    found = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    if (
        not isinstance(found, tuple | list)
        or len(found) != 2
        or not all(isinstance(number, int) for number in found)
        or not 1 <= found[0] <= found[1]
    ):
        raise ValueError(
            f"`concurrency` must be a number of actors, 1 or more, or the least and the most, got {concurrency!r}."
        )
    return found[0], found[1]


def _check_actor(needed: dict[str, float], found: dict[str, float]) -> None:
    """Refuse an actor for which there is no place, and for which Ray would wait without an end.

    Where there is a place for one, Ray begins, and makes the others as they find one (2.60).
    """
    for name, number in needed.items():
        if number > found.get(name, 0):
            raise ValueError(
                f"An actor needs {number:g} of {name!r}, and Ray has {found.get(name, 0):g} (`num_cpus` and"
                " `resources`). It would wait without an end. Ask for less, or start Ray with more, such as"
                " `ray.init(num_cpus=..., resources=...)`."
            )


def _check_cpus(actors: int, num_cpus: float, *, filters: bool, found: float) -> None:
    """Refuse what Ray would wait for without an end: its actors keep their CPUs while its tasks wait for some.

    Tasks that read, cut and write have one CPU each. The actor that leaves finished rows out has another one, and is
    there as soon as there are such rows (`plan_read_op.py`, 2.60).
    """
    own = 1 + filters
    needed = round(actors * num_cpus + own, 4)  # Ray counts as exactly
    if needed > found:
        raise ValueError(
            f"This needs {needed:g} CPUs, and Ray has {found:g}: {actors} x {num_cpus:g} for the actors (`concurrency`"
            f" and `num_cpus`), and {own} for Ray's own tasks, `checkpoint` included. It would wait without an end."
            " Lower one of these, or start Ray with more, such as `ray.init(num_cpus=...)`: they are only counted."
        )


def _is_read(operator: Any) -> bool:
    """Whether Ray leaves finished rows out of what a plan begins with.

    It does so behind these operators (`planner.py`, 2.60), and says nothing where a plan has none: a dataset that was
    made from Python objects, or materialized.
    """
    if type(operator).__name__ in ("Read", "ReadFiles"):
        return True
    return bool(operator.input_dependencies) and all(_is_read(each) for each in operator.input_dependencies)
