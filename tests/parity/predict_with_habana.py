"""A user's script with a strategy of lightning-habana. Each rank writes what it predicted to `folder/rank.json`.

python predict_with_habana.py folder strategy devices
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from lightning_hpu_infer import HPUInferenceAccelerator, emulator
from tests.helpers import Net, Rows, Writer


def main(folder: Path, strategy: str, devices: int) -> None:
    emulator.install()
    # It looks for the device when it is imported.
    habana: Any = importlib.import_module("lightning_habana")
    writer = Writer("batch")
    trainer = Trainer(
        accelerator=HPUInferenceAccelerator(),
        devices=devices,
        strategy=getattr(habana, strategy)(),
        callbacks=[writer],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    predictions: Any = trainer.predict(Net(), DataLoader(Rows(23), 2))
    result = {
        "indices": [indices for _, _, indices, _ in writer.batches],
        "predictions": [batch.tolist() for batch in predictions],
        "written": [batch.tolist() for *_, batch in writer.batches],
        "world_size": trainer.world_size,
        "root_device": trainer.strategy.root_device.type,
        "strategy": type(trainer.strategy).__name__,
        "checkpoint_io": type(trainer.strategy.checkpoint_io).__name__,
        "replays": emulator.stats().replays,
    }
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
