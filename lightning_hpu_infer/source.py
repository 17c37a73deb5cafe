"""Host batches, from the dataloader until they are ready to be copied to the device."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, count
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from tqdm.auto import tqdm

from lightning_hpu_infer.ahead import is_on_a_device
from lightning_hpu_infer.batch import Batch
from lightning_hpu_infer.lengths.buckets import Buckets, Lengths
from lightning_hpu_infer.observer import Lane, Observer, Stage
from lightning_hpu_infer.ownership import owned
from lightning_hpu_infer.randomness import kept_by_others
from lightning_hpu_infer.transfer import pin

Prepare = Callable[[Any, int], tuple[Any, Lengths | None]]


def host_batches(
    fetcher: Any,
    *,
    reused: Sequence[bool],
    convert: Callable[[Any, int], Any] | None,
    buckets: Buckets,
    pins: bool,
    observer: Observer,
    lane: Lane,
    progress: Any = None,
) -> Iterator[Batch]:
    """Fetch batches and prepare each: convert, pad, pin, own. Advancing this is the prefetch thread's work.

    Ends where a stage raises `StopIteration`, as stock Lightning does.

    Args:
        fetcher: Lightning's data fetcher, whose iteration has begun.
        reused: Per dataloader, whether its batches may be memory that it fills again, and are copied before it is asked
            for another. Copied last, so that hooks before the transfer get the loader's objects, as in stock Lightning.
        convert: The hooks before the transfer: `(data, dataloader_idx) -> data`.
        buckets: Pads batches.
        pins: Whether inputs go through pinned memory.
        observer: Observes the stages.
        lane: The lane of the thread that advances this.
        progress: The loop's `batch_progress`, if hooks before the transfer are to see whether a batch is the last one.
    """
    fetch = observer.wrap(Stage.FETCH, partial(next, fetcher), lane)
    prepare = _prepare(convert, buckets)
    if prepare is not None:
        prepare = observer.wrap(Stage.PREPARE, prepare, lane)
    keep = _keep(reused, pins)
    if keep is not None:
        keep = observer.wrap(Stage.PIN if pins else Stage.PREPARE, keep, lane)
    for index in count():
        observer.at(index, lane)
        try:
            data, batch_idx, dataloader_idx = fetch()
            is_last, lengths = fetcher.done, None
            if progress is not None:
                progress.is_last_batch = is_last
            if prepare is not None:
                data, lengths = prepare(data, dataloader_idx)
            if keep is not None:
                data = keep(data, dataloader_idx)
        except StopIteration:
            return
        yield Batch(index, data, batch_idx, dataloader_idx, is_last, lengths)


def _prepare(convert: Callable[[Any, int], Any] | None, buckets: Buckets) -> Prepare | None:
    """The host work on each batch; None if there is none."""
    if convert is None and not buckets.pads:
        return None

    def prepare(data: Any, dataloader_idx: int) -> tuple[Any, Lengths | None]:
        if convert is not None:
            data = convert(data, dataloader_idx)
        return buckets.pad(data)

    return prepare


def _keep(reused: Sequence[bool], pins: bool) -> Callable[[Any, int], Any] | None:
    """Moves each batch to memory that is read by the device, or that no loader writes; None if none needs that."""
    if not pins and not any(reused):
        return None

    def keep(data: Any, dataloader_idx: int) -> Any:
        if pins:
            return pin(data, owns=reused[dataloader_idx])
        return owned(data) if reused[dataloader_idx] else data

    return keep


def is_of_device(batch: Batch) -> bool:
    """Whether a dataloader's first batch is on the device, so that its batches are the main thread's work."""
    return batch.batch_idx == 0 and is_on_a_device(batch.data)


def warmed_up(
    batches: Iterator[Batch], buckets: Buckets, run: Callable[[Any, Batch], object], *, times: int, quiet: bool
) -> Iterator[Batch]:
    """`warm_up` with the first batch before it is handed on.

    Args:
        batches: Those of the run, as `host_batches` yields them.
        buckets: The buckets to run.
        run: Runs the step with host data in place of a batch's, and drops what it returns.
        times: Runs per bucket.
        quiet: Whether to show no progress bar.

    Returns:
        The same batches.
    """
    first = next(batches, None)
    if first is None:
        return batches
    warm_up(first.data, buckets, lambda data: run(data, first), times=times, quiet=quiet)
    return chain([first], batches)


def warm_up(data: Any, buckets: Buckets, run: Callable[[Any], object], *, times: int, quiet: bool) -> None:
    """Run a batch in every bucket, so that each has its graph afterwards.

    Main thread only. Random numbers are drawn as if this had not happened.

    Args:
        data: The first batch, on the host.
        buckets: The buckets to run, the largest first.
        run: Runs the step with host data, and drops what it returns.
        times: Runs per bucket: plainly, captured, and each replay that is verified.
        quiet: Whether to show no progress bar.
    """
    if not buckets.chosen:
        rank_zero_warn("`warm_up=True`: the buckets are not known before the first run, so there are none to warm up.")
    with kept_by_others(), torch.random.fork_rng(devices=[]):
        for length in tqdm((buckets.chosen or [])[::-1], desc="Warming up", unit="bucket", disable=quiet):
            padded = owned(buckets.spec.pad(buckets.spec.narrow(data, length), length))
            for _ in range(times):
                run(padded)
