"""A user's script that predicts on several devices. Each rank writes what it predicted to `folder/rank.json`.

python predict_on_devices.py folder device strategy devices [fault]

The strategy is a name that Lightning knows, or a class of lightning-habana.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.helpers import Net, Rows, Writer, trainer


class Faulty(Net):
    """Fails on one rank only."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if self.trainer.global_rank == 1 and batch_idx == 2:
            raise ValueError("rank 1 fails")
        return super().predict_step(batch, batch_idx)


def main(folder: Path, device: str, strategy: Any, devices: int, fault: bool) -> None:
    accelerator: Any = "cpu" if device == "stock" else HPUInferenceAccelerator()
    if device == "emulator":
        emulator.install(emulator.EmulatorConfig(num_devices=devices))
    if strategy.startswith("HPU"):
        # It looks for the device when it is imported.
        strategy = getattr(importlib.import_module("lightning_habana"), strategy)()
    writer = Writer("batch")
    ours = trainer(accelerator, [writer], devices=devices, strategy=strategy)
    predictions: Any = ours.predict(Faulty() if fault else Net(), DataLoader(Rows(23), 2))
    stats = emulator.stats() if device == "emulator" else None
    result = {
        "indices": [indices for _, _, indices, _ in writer.batches],
        "predictions": [batch.tolist() for batch in predictions],
        "written": [batch.tolist() for *_, batch in writer.batches],
        "world_size": ours.world_size,
        "root_device": ours.strategy.root_device.type,
        "strategy": type(ours.strategy).__name__,
        "checkpoint_io": type(ours.strategy.checkpoint_io).__name__,
        "replays": stats.replays if stats else 0,
    }
    (folder / f"{ours.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), "fault" in sys.argv)
