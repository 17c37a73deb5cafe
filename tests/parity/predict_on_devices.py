"""A user's script that predicts on several devices. Each rank writes what it predicted to `folder/rank.json`.

python predict_on_devices.py folder device strategy devices [fault]
"""

import json
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.helpers import Net, Rows, Writer


class Faulty(Net):
    """Fails on one rank only."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if self.trainer.global_rank == 1 and batch_idx == 2:
            raise ValueError("rank 1 fails")
        return super().predict_step(batch, batch_idx)


def main(folder: Path, device: str, strategy: str, devices: int, fault: bool) -> None:
    accelerator: Any = "cpu" if device == "stock" else HPUInferenceAccelerator()
    if device == "emulator":
        emulator.install()
    writer = Writer("batch")
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        callbacks=[writer],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    module: LightningModule = Faulty() if fault else Net()
    predictions: Any = trainer.predict(module, DataLoader(Rows(23), 2))
    stats = emulator.stats() if device == "emulator" else None
    result = {
        "indices": [indices for _, _, indices, _ in writer.batches],
        "predictions": [batch.tolist() for batch in predictions],
        "written": [batch.tolist() for *_, batch in writer.batches],
        "world_size": trainer.world_size,
        "root_device": trainer.strategy.root_device.type,
        "strategy": type(trainer.strategy).__name__,
        "replays": stats.replays if stats else 0,
    }
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), "fault" in sys.argv)
