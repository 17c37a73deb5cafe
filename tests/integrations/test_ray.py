"""The actor for Ray Data, called as Ray calls it; with Ray itself in `tests/ray/`."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_hpu_infer import InferenceConfig, emulator
from lightning_hpu_infer.integrations.ray import Predictor
from tests.helpers import Broken, Net, Rows


class Columns(nn.Module):
    """Predicts from the column `x`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net().net

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["x"])


def table_of(length: int = 11) -> dict[str, Any]:
    return {"id": np.arange(length), "x": Rows(length).rows.numpy()}


def expected(length: int = 11) -> Tensor:
    with torch.inference_mode():
        return Net().net(Rows(length).rows)


def check(found: list[Any], length: int = 11) -> None:
    assert np.concatenate([piece["id"] for piece in found]).tolist() == list(range(length))
    predictions = torch.from_numpy(np.concatenate([piece["prediction"] for piece in found]))
    torch.testing.assert_close(predictions, expected(length))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("batch_size", [1, 3, 100, None])
def test_rows_come_back_in_order_with_their_predictions(batch_size: int | None) -> None:
    predictor = Predictor(Columns, batch_size=batch_size, columns=["id"])
    found = list(predictor(table_of()))
    check(found)
    assert max(len(piece["id"]) for piece in found) == min(batch_size or 11, 11)
    check(list(predictor(table_of(5))), 5)
    predictor.close()


def test_rule_2_calls_at_once_share_one_thread_of_the_device(emulated: None) -> None:
    made: list[str] = []

    def factory() -> nn.Module:
        made.append(threading.current_thread().name)
        return Columns()

    predictor = Predictor(factory, batch_size=2, columns=["id"])
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda length: list(predictor(table_of(length))), [9, 10, 11, 12, 13, 14]):
            check(found, sum(len(piece["id"]) for piece in found))
    predictor.close()
    assert len(made) == 1
    assert emulator.stats().off_thread_calls == 0


def test_a_batch_is_launched_while_the_device_works_on_the_one_before(emulated: None) -> None:
    second = threading.Event()

    class Watched(Columns):
        calls = 0

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                second.set()
            return super().forward(batch)

    predictor = Predictor(Watched, batch_size=2, columns=["id"], config=InferenceConfig(hpu_graphs=False))
    found: list[Any] = []
    calling = threading.Thread(target=lambda: found.extend(predictor(table_of())), name="call")
    with emulator.paused("compute"):
        calling.start()
        assert second.wait(30)
        assert found == []
    calling.join(30)
    check(found)
    predictor.close()


class Counting(LightningModule):
    """Predicts how many steps had run when its batch was prepared."""

    steps = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch | {"steps": torch.full((len(batch["id"]),), self.steps)}

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        return batch["steps"] * 1


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("flags", [{}, {"in_flight": 2}, {"pipelining": False}], ids=str)
def test_rule_1_a_batch_that_may_depend_on_earlier_steps_is_prepared_behind_them(
    flags: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Within a call, and over calls at once."""
    config = InferenceConfig(hpu_graphs=False, **flags)
    with caplog.at_level("INFO"):
        predictor = Predictor(Counting, batch_size=2, config=config)
    assert "No batch is prepared ahead, since `on_before_batch_transfer` of Counting" in caplog.text
    with ThreadPoolExecutor(3) as threads:
        calls = list(threads.map(lambda length: list(predictor(table_of(length))), [8, 9, 10]))
    seen = [[int(piece["prediction"][0]) for piece in pieces] for pieces in calls]
    assert all(steps == sorted(steps) for steps in seen)
    assert sorted(chain.from_iterable(seen)) == list(range(4 + 5 + 5))
    predictor.close()


def test_whoever_asks_to_prepare_ahead_gets_it(emulated: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        predictor = Predictor(Counting, batch_size=2, config=InferenceConfig(hpu_graphs=False, prefetch=2))
    assert "No batch is prepared ahead" not in caplog.text
    assert len(list(predictor(table_of()))) == 6
    predictor.close()


def test_errors_reach_the_call_whose_rows_they_are(device: str) -> None:
    def preprocess(table: Any) -> Any:
        if 7 in table["id"]:
            raise Broken("row 7")
        batch = {"x": torch.from_numpy(table["x"])}
        return {"x": batch["x"][:, :2]} if 100 in table["id"] else batch

    predictor = Predictor(Columns, batch_size=2, columns=["id"], preprocess=preprocess)
    found: list[Any] = []
    with pytest.raises(Broken, match="row 7"):
        found.extend(predictor(table_of()))
    with pytest.raises(RuntimeError, match=r"mat1|shapes|reduction dim"):
        list(predictor({"id": np.array([100]), "x": np.ones((1, 4), np.float32)}))
    check(list(predictor(table_of(5))), 5)
    predictor.close()


def test_an_error_of_the_factory_surfaces_and_leaves_no_thread() -> None:
    def factory() -> nn.Module:
        raise Broken("no weights")

    with pytest.raises(Broken, match="no weights"):
        Predictor(factory)
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, or None, got 0"):
        Predictor(Columns, batch_size=0)
    with pytest.raises(ValueError, match=r"`columns` must be a list of names, got 'id': pass `columns=\['id'\]`"):
        Predictor(Columns, columns="id")


def test_postprocess_makes_the_columns(device: str) -> None:
    config = InferenceConfig(postprocess=lambda output: {"best": output.argmax(1), "text": ["row"] * len(output)})
    predictor = Predictor(Columns, batch_size=4, columns=[], config=config)
    found = list(predictor(table_of()))
    assert [list(piece) for piece in found] == [["best", "text"]] * 3
    assert np.concatenate([piece["best"] for piece in found]).tolist() == expected().argmax(1).tolist()
    predictor.close()
