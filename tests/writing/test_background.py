"""The thread writes all in order, holds no more bytes than it may, and its errors surface."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter
from lightning_hpu_infer.writing.background import Background
from tests.helpers import Net, rows, trainer


def test_items_are_written_in_order() -> None:
    written: list[int] = []
    background = Background(written.append, 10)
    for item in range(100):
        background.put(item, 1)
    background.close()
    assert written == list(range(100))
    background.close()


def test_it_takes_no_more_bytes_than_it_may() -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)
    held: list[int] = []

    def write(size: int) -> None:
        begun.release()
        go_on.acquire()
        held.remove(size)

    background = Background(write, 10)

    def put(size: int) -> None:
        background.put(size, size)

    for size in (4, 6):
        held.append(size)
        put(size)
    begun.acquire()
    # 10 bytes are in it, those being written included: 1 more has to wait until a write is done.
    late = threading.Thread(target=put, args=(1,), name="late")
    late.start()
    late.join(0.05)
    assert late.is_alive()
    held.append(1)
    go_on.release()
    late.join(10)
    assert not late.is_alive()
    go_on.release(3)
    background.close()
    assert held == []


def test_an_item_larger_than_the_bound_is_let_in_alone() -> None:
    written: list[str] = []
    background = Background(written.append, 10)
    for item in ("small", "large", "small"):
        background.put(item, 1000 if item == "large" else 5)
    background.close()
    assert written == ["small", "large", "small"]


def failing(item: int) -> None:
    if item == 1:
        raise OSError("no space")


def test_an_error_is_raised_once_and_names_the_batch() -> None:
    background = Background(failing, 1)
    background.put(0, 1, "batch 0")
    background.put(1, 1, "batch 1")
    with pytest.raises(OSError, match="no space") as raised:  # It waits for room, and there is an error instead.
        background.put(2, 1, "batch 2")
    assert "Raised while batch 1 was written" in "".join(getattr(raised.value, "__notes__", []))
    with pytest.raises(RuntimeError, match="ended by an error"):
        background.put(3, 1)
    background.close()


def test_an_error_that_no_put_has_raised_is_raised_by_close() -> None:
    background = Background(failing, 10)
    background.put(1, 1)
    with pytest.raises(OSError, match="no space"):
        background.close()
    background.close()


def test_closing_without_draining_drops_what_waits() -> None:
    begun, go_on = threading.Event(), threading.Event()
    written: list[int] = []

    def write(item: int) -> None:
        begun.set()
        go_on.wait()
        written.append(item)

    background = Background(write, 10)
    background.put(0, 1)
    background.put(1, 1)
    begun.wait()
    closing = threading.Thread(target=background.close, kwargs={"drain": False}, name="closing")
    closing.start()
    while background._items:  # It drops them before it waits for the one at work.
        pass
    go_on.set()
    closing.join()
    assert written == [0]
    with pytest.raises(RuntimeError, match="It takes no more"):
        background.put(2, 1)


def test_spans_are_told() -> None:
    spans: list[tuple[float, float, int]] = []
    background: Background[int] = Background(lambda item: None, 10, on_done=lambda *span: spans.append(span))
    background.put(7, 1)
    background.close()
    ((start, end, item),) = spans
    assert start <= end
    assert item == 7


SIZE = 100_000
PREDICTIONS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.zeros(2, SIZE // 2, dtype=torch.uint8),
    "array": lambda: np.zeros((2, SIZE // 2), np.uint8),
    "array of objects": lambda: np.array(["x" * (SIZE // 2)] * 2, object),
    "strings": lambda: ["x" * (SIZE // 2)] * 2,
    "bytes": lambda: {"raw": [b"x" * (SIZE // 2)] * 2},
    "numbers": lambda: [list(range(SIZE // 16))] * 2,
    "dicts": lambda: [{"text": "x" * (SIZE // 2), "none": None}] * 2,
}


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_rule_9_whatever_a_step_returns_counts_with_all_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    class Returns(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return PREDICTIONS[kind]()

    counted: list[int] = []
    put = Background.put

    def counting(background: Background[Any], item: Any, nbytes: int, where: str = "") -> None:
        counted.append(nbytes)
        put(background, item, nbytes, where)

    monkeypatch.setattr(Background, "put", counting)
    ours = trainer(HPUInferenceAccelerator(), [PredictionWriter(tmp_path)])
    ours.predict(Returns(), rows(4, 2), return_predictions=False)
    assert len(counted) == 2
    assert all(SIZE <= nbytes < 4 * SIZE for nbytes in counted)
