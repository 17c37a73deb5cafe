"""`group_by_length` with a sampler that draws random numbers: the order is the one that stock Lightning would draw."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from lightning_hpu_infer import HPUInferenceAccelerator
from tests.helpers import Net, Rows, assert_equal, predict


class Drawing(Net):
    """Draws a number after each step, which goes on where the sampler ended."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.drawn.append(float(torch.rand(())))
        return super().predict_step(batch, batch_idx)


@pytest.mark.usefixtures("device")
@pytest.mark.filterwarnings("ignore:Your `predict_dataloader`.s sampler has shuffling enabled")
@pytest.mark.parametrize("seeded", [False, True], ids=["torch's generator", "one of its own"])
@pytest.mark.parametrize("kind", ["in order", "shuffled", "with replacement"])
def test_rule_1_the_same_seed_gives_the_same_order(kind: str, seeded: bool) -> None:
    def run(accelerator: Any) -> tuple[list[Any], list[float], float]:
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2) if seeded else None
        rows = Rows(23)
        sampler = RandomSampler(rows, True, 31, generator) if kind == "with replacement" else None
        loader = DataLoader(rows, 4, shuffle=kind == "shuffled", sampler=sampler, generator=generator)
        module = Drawing()
        torch.manual_seed(3)
        return predict(accelerator, module, loader), module.drawn, float(torch.rand((), generator=generator))

    expected = run("cpu")
    found = run(HPUInferenceAccelerator(group_by_length=list(range(23)), hpu_graphs=False))
    assert_equal(found[0], expected[0])
    assert found[1:] == expected[1:]
