"""Each technique toggles alone and does what it says, by the emulator's counters."""

import threading
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.helpers import ALL_OFF, Net, Rows, assert_like_stock, predict, rows, trainer

pytestmark = pytest.mark.usefixtures("emulated")

BATCHES = 6


def counted(flags: dict[str, Any], module: Net | None = None, loader: Any = None) -> emulator.EmulatorStats:
    """The emulator's counters over one run that gives the right predictions."""
    module, loader = module or Net(), loader or rows(2 * BATCHES, 2)
    expected = predict("cpu", module, loader)
    emulator.reset_stats()
    predictions = predict(HPUInferenceAccelerator(**flags), module, loader)
    stats = emulator.stats()
    torch.testing.assert_close(predictions, expected)
    return stats


def test_graphs_replace_programs_of_single_ops_by_replays() -> None:
    plain, graphed = counted(ALL_OFF), counted(ALL_OFF | {"hpu_graphs": True})
    assert (plain.captures, plain.replays) == (0, 0)
    # The first step runs plainly, the second captures and replays at once.
    assert (graphed.captures, graphed.replays) == (1, BATCHES - 1)
    assert graphed.off_thread_calls == plain.off_thread_calls == 0


@pytest.mark.parametrize("pipelining", [False, True])
def test_async_copies_read_pinned_staging_buffers(pipelining: bool) -> None:
    plain = counted(ALL_OFF | {"pipelining": pipelining})
    staged = counted(ALL_OFF | {"pipelining": pipelining, "async_copy": True})
    assert plain.h2d_pinned == 0
    assert staged.h2d_pinned == BATCHES
    assert staged.h2d_bytes == plain.h2d_bytes


def test_async_copies_do_not_wait_for_the_copy() -> None:
    """With the copy engine held, every batch's copy is issued and the step is launched all the same."""
    held = emulator.paused("h2d")

    class Hold(Net):
        def on_predict_start(self) -> None:
            held.__enter__()

        def on_predict_epoch_end(self) -> None:
            held.__exit__(None, None, None)

    flags = ALL_OFF | {"async_copy": True}
    trainer(HPUInferenceAccelerator(**flags)).predict(Hold(), rows(2 * BATCHES, 2), return_predictions=False)
    assert emulator.stats().h2d_pinned == BATCHES


class LaunchLog(Callback):
    """What was fetched from the device when each batch's end hook ran, and what was launched by then."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_predict_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        self.events.append(f"launch {batch_idx}")

    def on_predict_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, i: int, *_: Any) -> None:
        self.events.append(f"fetched {i}" if outputs.device.type == "cpu" else f"not fetched {i}")


def test_pipelining_fetches_batch_k_after_batch_k_plus_1_was_launched() -> None:
    log = LaunchLog()
    predict(HPUInferenceAccelerator(defer_hooks=True), Net(), rows(6, 2), callbacks=[log])
    assert log.events == ["launch 0", "launch 1", "fetched 0", "launch 2", "fetched 1", "fetched 2"]


def test_pipelining_launches_a_batch_while_the_device_is_busy_with_the_one_before() -> None:
    """With the compute engine held, stock order could not get past its first batch; pipelining launches two."""
    launched = threading.Semaphore(0)

    class Signal(Callback):
        def on_predict_batch_start(self, *_: Any, **__: Any) -> None:
            launched.release()

    held = emulator.paused("compute")

    class Hold(Net):
        def on_predict_start(self) -> None:
            held.__enter__()

    def let_go() -> None:
        for _ in range(2):
            assert launched.acquire(timeout=20)
        held.__exit__(None, None, None)

    helper = threading.Thread(target=let_go)
    helper.start()
    predict(HPUInferenceAccelerator(hpu_graphs=False), Hold(), rows(8, 2), callbacks=[Signal()])
    helper.join()


def test_pipelining_prepares_later_batches_while_the_device_works() -> None:
    prepared = threading.Semaphore(0)
    held = emulator.paused("compute")

    class Watched(Rows):
        def __getitem__(self, index: int) -> Tensor:
            prepared.release()
            return super().__getitem__(index)

    class Hold(Net):
        def on_predict_start(self) -> None:
            held.__enter__()

    def let_go() -> None:
        # Two batches in flight or waiting for their output, two more prepared: stock order would stop at one.
        for _ in range(4):
            assert prepared.acquire(timeout=20)
        held.__exit__(None, None, None)

    helper = threading.Thread(target=let_go)
    helper.start()
    predict(HPUInferenceAccelerator(hpu_graphs=False), Hold(), DataLoader(Watched(8), 1))
    helper.join()


def test_rule_2_all_device_calls_come_from_one_thread() -> None:
    assert counted({"prefetch": 4, "in_flight": 3}).off_thread_calls == 0


def test_rule_6_a_step_marker_follows_every_launch() -> None:
    for flags in (ALL_OFF, {}):
        emulator.reset_stats()
        trainer(HPUInferenceAccelerator(**flags)).predict(Net(), rows(2 * BATCHES, 2), return_predictions=False)
        assert emulator.stats().mark_steps >= BATCHES


def test_rule_8_copies_to_the_host_wait_unless_an_event_says_when_they_are_complete() -> None:
    assert counted({"async_output": False}).d2h_non_blocking == 0
    assert counted({}).d2h_non_blocking == BATCHES


def test_rule_10_the_host_waits_when_nobody_fetches() -> None:
    """Without outputs to fetch, an event bounds how far the host runs ahead of the device."""
    emulator.reset_stats()
    trainer(HPUInferenceAccelerator()).predict(Net(), rows(40, 2), return_predictions=False)
    stats = emulator.stats()
    # Weights come back to the host at the end; no output does.
    # The comparison of a new graph with the plain ops reads two outputs twice.
    assert stats.d2h_copies <= len(list(Net().parameters())) + 2 + 4
    assert stats.blocking_waits >= 19


class Tokens(Net):
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch["x"]) + batch["ids"]


@pytest.mark.parametrize("flags", [{}, ALL_OFF], ids=str)
def test_64_bit_inputs_are_not_pinned_since_the_bridge_casts_them_first(flags: dict[str, Any]) -> None:
    data = [{"x": row, "ids": torch.tensor([i])} for i, row in enumerate(Rows(8).rows)]
    stats = counted(flags, Tokens(), DataLoader(data, 2))  # type: ignore[arg-type]
    assert stats.h2d_pinned == (4 if flags == {} else 0)


def test_a_shape_that_comes_once_is_not_captured() -> None:
    stats = counted({}, loader=rows(11, 2))
    assert (stats.captures, stats.replays) == (1, 4)


def test_every_shape_that_comes_back_is_a_graph() -> None:
    stats = counted({}, loader=[rows(8, 2), rows(12, 3)])
    assert (stats.captures, stats.replays) == (2, 3 + 3)


def test_more_input_shapes_than_max_graphs_push_out_the_least_recently_used() -> None:
    lengths = [torch.randn(n, 4) for n in (2, 3, 4, 2, 3, 2, 4, 4, 2, 4)]
    stats = counted({"max_graphs": 2, "verify_graphs": 0}, loader=DataLoader(lengths, batch_size=None))  # type: ignore[arg-type]
    # 2, 3 and 4 run plainly; 2 and 3 are captured; 2 is replayed; 4 may take the place of 3 when it has come twice
    # since 3 was used; 2 and 4 are replayed.
    assert (stats.captures, stats.replays) == (3, 3 + 3)


def test_more_shapes_in_turn_than_max_graphs_do_not_replace_each_other_without_end() -> None:
    lengths = [torch.randn(n, 4) for n in (2, 3, 4) * 6]
    with pytest.warns(UserWarning, match="There are more shapes in use than `max_graphs=2`"):
        stats = counted({"max_graphs": 2, "verify_graphs": 0}, loader=DataLoader(lengths, batch_size=None))  # type: ignore[arg-type]
    assert stats.captures <= 3
    assert stats.replays >= 2 * 5 - 1


def test_like_stock_on_the_cpu_with_every_flag_alone() -> None:
    for flag in ("hpu_graphs", "async_copy", "pipelining"):
        assert_like_stock(HPUInferenceAccelerator(**(ALL_OFF | {flag: True})), Net(), rows(7, 2))
