"""What a graph copies from the host is as new in every replay, also where ops of the graph write to the copy."""

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.helpers import predict

pytestmark = pytest.mark.usefixtures("emulated")


class Counting(LightningModule):
    """Adds to its result what a copy of host values is after it was written to."""

    def __init__(self, written: Callable[["Counting", torch.device], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 4)
        self.host = torch.zeros(4)  # no buffer: it stays on the host, as the length of a static cache does
        self.written = written

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch) + self.written(self, batch.device)


def in_part(copied: Tensor) -> Tensor:
    copied[1:].mul_(2)
    return copied


WRITTEN: dict[str, Callable[[Counting, torch.device], Tensor]] = {
    "a host attribute": lambda m, device: m.host.to(device, copy=True).add_(1),
    "a part of it": lambda m, device: m.host[:1].to(device, copy=True).add_(1),
    "what was computed of it": lambda m, device: (m.host + 1).to(device).add_(1),
    "made in the step": lambda m, device: torch.ones(4).to(device).add_(1),
    "made on the device": lambda m, device: torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).add_(1),
    "written in part": lambda m, device: in_part(torch.ones(4).to(device)),
    "as_tensor": lambda m, device: torch.as_tensor([1.0, 2.0, 3.0, 4.0], device=device).mul_(2),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_each_replay_begins_with_the_values_of_the_host(name: str) -> None:
    module = Counting(WRITTEN[name])
    loader = DataLoader(torch.randn(24, 4), 4)  # type: ignore[arg-type,var-annotated]
    expected = predict("cpu", module, loader)
    emulator.reset_stats()
    # Nothing is verified, so that nothing but the graph's own results is returned.
    graphs = HPUInferenceAccelerator(hpu_graphs="hpu_graph", verify_graphs=0)
    torch.testing.assert_close(predict(graphs, module, loader), expected)
    assert emulator.stats().replays > 2
