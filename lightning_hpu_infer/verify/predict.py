"""Runs of `trainer.predict` as checks make them."""

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_hpu_infer import _habana
from lightning_hpu_infer.accelerator import HPUInferenceAccelerator
from lightning_hpu_infer.graphs.counts import GraphCounts
from lightning_hpu_infer.verify.check import Broken, NotTried

ALL_OFF: dict[str, Any] = {"hpu_graphs": False, "async_copy": False, "async_output": False, "pipelining": False}
"""The plugin in stock Lightning's order, without any of its techniques."""
_BARE: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


class Batches:
    """Batches that are there already. Lightning takes a plain list for several dataloaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


@dataclass(frozen=True)
class Run:
    """What a run gave.

    Args:
        predictions: What `trainer.predict` returned.
        warnings: The texts of warnings.
        counts: What graphs did; None where there are none.
    """

    predictions: Any
    warnings: list[str] = field(default_factory=list)
    counts: GraphCounts | None = None


def insisting() -> str:
    """The value of `hpu_graphs` that leaves out no run, however short, in this process's mode."""
    return "hpu_graph" if _habana.is_lazy() else "compile"


def trainer(accelerator: Any, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A Trainer that does nothing but predict, and says nothing.

    Args:
        accelerator: "cpu" for stock Lightning, or flags of ours.
        callbacks: Of the Trainer.
        **options: Of the Trainer too, such as `precision`.
    """
    if isinstance(accelerator, dict):
        accelerator = HPUInferenceAccelerator(**accelerator)
    options = _BARE | {"default_root_dir": tempfile.gettempdir()} | options
    with _quiet():
        return Trainer(accelerator=accelerator, callbacks=list(callbacks), **options)


def predict(
    accelerator: Any,
    module: LightningModule,
    batches: Sequence[Any],
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Run:
    """Predict.

    Args:
        accelerator: As for `trainer`, or a Trainer.
        module: The model, which stays as it is unless callbacks change it.
        batches: On the host.
        callbacks: Of the Trainer.
        **options: Of the Trainer too, such as `precision`.
    """
    with warnings.catch_warnings(record=True) as caught, _quiet():
        warnings.simplefilter("always")
        ours = accelerator if isinstance(accelerator, Trainer) else trainer(accelerator, callbacks, **options)
        predictions = ours.predict(module, Batches(batches))
    said = [str(each.message) for each in caught if "runs without" in str(each.message)]
    return Run(predictions, said, getattr(ours.predict_loop, "graph_counts", None))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says of each Trainer."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def check_graphs(run: Run) -> str:
    """What a run's graphs did, in words.

    Raises:
        Broken: If a graph differed from the plain ops. The run was right nevertheless: it went on without the graph.
        NotTried: If there was no graph.
    """
    wrong = [text for text in run.warnings if "differs from the plain ops" in text or "failed" in text]
    if wrong:
        raise Broken(f"predictions are right, but {wrong[0]}")
    if run.counts is None or not run.counts.replays:
        reasons = [] if run.counts is None else [text for text, _ in run.counts.reasons.most_common(1)]
        raise NotTried(
            f"predictions are right, but no graph ran: {(reasons or run.warnings or ['no reason given'])[0]}"
        )
    return f"{run.counts.captures} captured, {run.counts.replays} replays"
