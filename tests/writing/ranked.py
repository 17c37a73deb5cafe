"""What each of several ranks does: predict into a folder that they share, and tell what it did.

python ranked.py folder OPTIONS

Predictions are in `folder/out`, what a rank saw in `folder/rank.json`. OPTIONS are JSON:

    {"on": "cpu", "size": 3, "stream": false, "killed": 1, "writer": {"overwrite": true}}

The rank `killed` is killed in its third batch, in which the other one waits for what torchrun does then: send SIGTERM.
With `"terminated": true` what has started the ranks (torchrun or rank 0) gets SIGTERM when both are in that batch.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter, emulator
from tests.helpers import trainer
from tests.writing.predicting import Numbers, Scores

COUNT = 41


class Killed(Scores):
    def __init__(self, rank: int | None, meeting: Path | None) -> None:
        super().__init__()
        self.rank = rank
        self.meeting = meeting

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().on_predict_batch_start(batch, batch_idx)
        if (self.rank is not None or self.meeting is not None) and batch_idx == 2:
            if self.rank == self.trainer.global_rank:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.meeting is not None:
                (self.meeting / f"{self.trainer.global_rank}.here").touch()
                while self.trainer.global_rank == 0 and len(list(self.meeting.glob("*.here"))) < 2:
                    time.sleep(0.01)
                if self.trainer.global_rank == 0:
                    os.kill(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid(), signal.SIGTERM)
            while not self.trainer.received_sigterm:
                time.sleep(0.01)


class Own(IterableDataset[dict[str, Any]]):
    """Each rank has a stream of its own, of other lengths."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(Numbers(COUNT).__getitem__, range(self.rank, COUNT - 8 * self.rank, 2))


def main(folder: Path, options: dict[str, Any]) -> None:
    accelerator: Any = "cpu" if options["on"] == "stock" else HPUInferenceAccelerator()
    if options["on"] == "emulator":
        emulator.install(emulator.EmulatorConfig(num_devices=2))
    writer = PredictionWriter(folder / "out", **options.get("writer", {}))
    ours = trainer(accelerator, [writer], devices=2, strategy="ddp" if options["on"] == "stock" else "auto")
    numbers = Numbers(COUNT)
    data: Any = Own(int(os.environ["RANK"])) if options.get("stream") else numbers
    module = Killed(options.get("killed"), folder if options.get("terminated") else None)
    ours.predict(module, DataLoader(data, options["size"]), return_predictions=False)
    told = {"loaded": numbers.loaded, "batches": len(module.seen), "device": ours.strategy.root_device.type}
    (folder / f"{ours.global_rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
