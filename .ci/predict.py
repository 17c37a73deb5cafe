"""Predict with the installed package outside of its checkout, as stock Lightning does, on each device named."""

import subprocess
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_hpu_infer
from lightning_hpu_infer import HPUInferenceAccelerator, emulator

OPTIONS = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Net(LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch through the network."""
        return self.net(batch).softmax(-1)


def main(devices: list[str]) -> None:
    """Compare the plugin's predictions on the devices with stock Lightning's, and run the command line."""
    package = Path(lightning_hpu_infer.__file__).parent
    assert (package / "py.typed").is_file(), package
    assert (package / "emulator" / "README.md").is_file(), package
    net, loader = Net(), DataLoader(torch.randn(20, 4), batch_size=4)
    expected = Trainer(accelerator="cpu", **OPTIONS).predict(net, loader)
    assert expected
    for device in devices:
        if device == "emulator":
            emulator.install()
        try:
            # "hpu_graph" insists on graphs, which a run as short as this one would not be given.
            accelerator = HPUInferenceAccelerator(hpu_graphs="hpu_graph" if device == "emulator" else True)
            predictions = Trainer(accelerator=accelerator, **OPTIONS).predict(net, loader)
            replays = emulator.stats().replays if device == "emulator" else None
        finally:
            emulator.uninstall()
        torch.testing.assert_close(predictions, expected)
        assert replays is None or replays > 0
        sys.stdout.write(f"{package} {lightning_hpu_infer.__version__}: {device} predicts like stock Lightning\n")
    command = [sys.executable, "-m", "lightning_hpu_infer", "doctor", "--json"]
    doctor = subprocess.run(command, capture_output=True, text=True)
    assert '"facts"' in doctor.stdout, doctor


if __name__ == "__main__":
    main(sys.argv[1:])
