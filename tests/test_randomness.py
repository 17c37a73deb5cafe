"""Random numbers of a dataset while something else restores the random state: each is drawn once."""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_hpu_infer import HPUInferenceAccelerator, randomness
from lightning_hpu_infer.randomness import drawing, kept_by_others, tracing
from tests.helpers import Net, assert_equal, predict, rows


class Noted:
    """The lock, which tells when somebody waits for it who will restore the state."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waited_for = threading.Event()

    def acquire(self, *, timeout: float) -> bool:
        self.waited_for.set()
        return self.lock.acquire(timeout=timeout)

    def release(self) -> None:
        self.lock.release()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class Draws(Dataset[Tensor]):
    """Draws each sample; one of them when TorchDynamo has kept the state already, which it will restore."""

    def __init__(self, kept: threading.Event | None = None) -> None:
        self.kept = kept

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Tensor:
        if self.kept is not None and index == 4:
            assert self.kept.wait(20)
        return torch.rand(4) + random.random() + float(np.random.rand())


@pytest.mark.usefixtures("emulated", "fresh_dynamo")
def test_numbers_that_a_dataset_draws_while_a_step_is_traced_are_those_of_stock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(accelerator: Any, dataset: Draws) -> Any:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        return predict(accelerator, Net(), DataLoader(dataset, 2))

    expected = run("cpu", Draws())
    noted = Noted()
    monkeypatch.setattr(randomness, "_drawing", noted)
    accelerator = HPUInferenceAccelerator(hpu_graphs="hpu_graph", prefetch=8)
    assert_equal(run(accelerator, Draws(noted.waited_for)), expected)


DRAW: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(1)),
    "python": random.random,
    "numpy": lambda: float(np.random.rand()),
}


@pytest.mark.filterwarnings("ignore:.*predict_step.* runs without")
@pytest.mark.usefixtures("device", "fresh_dynamo")
@pytest.mark.parametrize("generator", DRAW)
@pytest.mark.parametrize("flags", [{"hpu_graphs": "hpu_graph"}, {}, {"pipelining": False}], ids=str)
def test_numbers_that_a_traced_step_draws_are_those_of_stock(generator: str, flags: dict[str, Any]) -> None:
    class Step(Net):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self.net(batch) + DRAW[generator]()

    def run(accelerator: Any) -> Any:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        return predict(accelerator, Step(), rows(24, 2))

    assert_equal(run(HPUInferenceAccelerator(**flags)), run("cpu"))


def test_numbers_that_were_drawn_after_a_trace_are_not_drawn_again() -> None:
    with drawing():
        random.random()
    with tracing():
        pass
    random.random()
    state = random.getstate()
    with drawing():
        assert random.getstate() == state


def test_what_restores_the_state_waits_for_what_draws() -> None:
    begun, drawn = threading.Event(), threading.Event()
    values: list[Tensor] = []

    def draw() -> None:
        with drawing():
            begun.set()
            drawn.wait(10)
            values.append(torch.rand(3))

    torch.manual_seed(0)
    thread = threading.Thread(target=draw)
    thread.start()
    begun.wait(10)
    threading.Timer(0, drawn.set).start()
    with kept_by_others(), torch.random.fork_rng(devices=[]):
        assert len(values) == 1
        torch.rand(5)
    thread.join()
    values.append(torch.rand(3))
    torch.manual_seed(0)
    assert torch.equal(torch.cat(values), torch.cat([torch.rand(3), torch.rand(3)]))


def test_it_does_not_wait_forever_for_what_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "_PATIENCE_SECONDS", 0.01)
    begun, done = threading.Event(), threading.Event()

    def draw() -> None:
        with drawing():
            begun.set()
            done.wait(10)

    thread = threading.Thread(target=draw)
    thread.start()
    begun.wait(10)
    with kept_by_others():
        done.set()
    thread.join(10)
    assert not thread.is_alive()
