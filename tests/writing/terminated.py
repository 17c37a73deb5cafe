"""A user's script that waits in a batch until SIGTERM comes: python terminated.py path."""

import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from tests.writing.predicting import Numbers, Scores, predict


class Waiting(Scores):
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 3:
            sys.stdout.write("in batch 3\n")
            sys.stdout.flush()
            while not self.trainer.received_sigterm:
                time.sleep(0.01)


if __name__ == "__main__":
    predict(Path(sys.argv[1]), Waiting(), DataLoader(Numbers(), 4))
