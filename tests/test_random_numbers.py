"""Random numbers of steps, hooks and batches come in stock Lightning's order."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from lightning_hpu_infer import HPUInferenceAccelerator
from lightning_hpu_infer.ahead import reason_against
from tests.helpers import Net, Rows, assert_equal, predict


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


class Random(Rows):
    """Samples with noise, or that only seed."""

    def __init__(self, draw: Callable[[int], object]) -> None:
        super().__init__(12)
        self.draw = draw

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index] * (1.0 if (drawn := self.draw(index)) is None else float(drawn))  # type: ignore[arg-type]


class Stream(IterableDataset[Tensor]):
    def __init__(self, draw: Callable[[int], object]) -> None:
        self.rows = Random(draw)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.rows[index] for index in range(12))


class Scaled(Net):
    def __init__(self, draw: Callable[[int], object]) -> None:
        super().__init__()
        self.draw = draw

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self.net(batch) * (1.0 if (drawn := self.draw(batch_idx)) is None else float(drawn))  # type: ignore[arg-type]


class MonteCarlo(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(self.net, nn.Dropout(0.5))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.net.train()
        return self.net(batch)


class Seeds(Callback):
    def on_predict_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        seed(batch_idx)


def seed_torch(index: int) -> float:
    torch.manual_seed(index)
    return float(torch.rand(1))


RANDOM: dict[str, Callable[[int], object]] = {
    "torch": lambda index: torch.rand(1),
    "python": lambda index: random.random(),
    "numpy": lambda index: np.random.rand(),
    "dropout": lambda index: functional.dropout(torch.ones(1)),
    "seeds python": random.seed,
    "seeds torch": seed_torch,
    "numpy from a list": lambda index: np.random.permutation(9)[0],
}
NOTHING: Callable[[int], object] = lambda index: None  # noqa: E731


def both(name: str) -> Any:
    return Scaled(RANDOM[name]), DataLoader(Random(RANDOM[name]), 2), []


TOGETHER: dict[str, Callable[[], tuple[Any, Any, list[Any]]]] = {
    **{name: partial(both, name) for name in RANDOM},
    "seeds and draws": lambda: (Scaled(RANDOM["python"]), DataLoader(Random(RANDOM["seeds python"]), 2), []),
    "a stream": lambda: (Scaled(RANDOM["torch"]), DataLoader(Stream(RANDOM["torch"]), 2), []),
    "a callback": lambda: (Scaled(NOTHING), DataLoader(Random(RANDOM["torch"]), 2), [Seeds()]),
    "dropout": lambda: (MonteCarlo(), DataLoader(Random(RANDOM["torch"]), 2), []),
    "loaders": lambda: (Scaled(RANDOM["torch"]), [DataLoader(Rows(4), 2), DataLoader(Rows(6), 2, shuffle=True)], []),
}


@pytest.mark.filterwarnings("ignore:Your `predict_dataloader`'s sampler has shuffling")
@pytest.mark.parametrize("flags", [{}, {"in_flight": 3, "pipelining": "auto"}], ids=str)
@pytest.mark.parametrize("case", TOGETHER)
def test_numbers_that_steps_and_batches_draw_are_those_of_stock(case: str, flags: dict[str, Any], device: str) -> None:
    def run(accelerator: Any) -> Any:
        module, loader, callbacks = TOGETHER[case]()
        seed(0)
        predicted = predict(accelerator, module, loader, callbacks=callbacks)
        return predicted, torch.rand(1), random.random(), np.random.rand()

    if case == "dropout" and device == "emulator":
        pytest.skip("a device has other random numbers")
    assert_equal(run(HPUInferenceAccelerator(**flags, hpu_graphs=False)), run("cpu"))


class Trained(Net):
    """Draws random numbers, but not to predict."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def _init_weights(self) -> None:
        nn.init.normal_(next(self.net.parameters()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.rand(1)

    def forward(self, batch: Any) -> Any:
        return self.dropout(self.net(batch))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return self(batch)


def test_what_draws_to_train_is_no_reason() -> None:
    loaders = [DataLoader(Random(RANDOM["torch"])), DataLoader(Rows(2))]
    assert not reason_against(loaders, [Trained().eval()])
    assert "draw random numbers" in reason_against(loaders, [Scaled(RANDOM["torch"])])
    assert "draw random numbers" in reason_against(loaders[1:] * 2, [Scaled(RANDOM["torch"])])
    assert not reason_against(loaders[1:], [Scaled(RANDOM["torch"])])
