"""Write predictions, lose the process in the middle, and go on where it stopped.

    python -m examples.write_and_resume

The script starts itself in another process and kills it, as the failure of a machine would. Then it predicts what was
not written yet, in batches of another size. Needs the extra `[write]`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from examples.compare import quiet
from lightning_hpu_infer import HPUInferenceAccelerator, PredictionWriter, read_predictions

SAMPLES = 2_000


class Samples(Dataset[Tensor]):
    """Sample `i` is made of `i`. Counts what is loaded."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.loaded = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        time.sleep(self.seconds)
        self.loaded += 1
        return torch.full((8,), index / SAMPLES)


class Classifier(LightningModule):
    """Stands for yours."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        logits = self.net(batch)
        return {"logits": logits, "label": logits.argmax(-1)}


def predict(path: Path, batch_size: int, seconds: float = 0.0) -> int:
    """Predict what is not written yet; returns how many samples were loaded."""
    torch.manual_seed(0)  # stands for a checkpoint: both processes have the same weights
    samples = Samples(seconds)
    trainer = Trainer(
        accelerator=HPUInferenceAccelerator(),
        callbacks=[PredictionWriter(path, rows_per_file=200)],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.predict(Classifier(), DataLoader(samples, batch_size), return_predictions=False)
    return samples.loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for the predictions; a new one by default")
    parser.add_argument("--victim", action="store_true", help="only predict, slowly: what the script starts and kills")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "predictions"
    quiet()
    if options.victim:
        predict(out, batch_size=10, seconds=0.005)
        return

    command = [sys.executable, "-m", "examples.write_and_resume", "--victim", "--out", str(out.absolute())]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1]) as victim:
        while victim.poll() is None and len(list(out.glob("**/*.parquet"))) < 3:
            time.sleep(0.01)
        victim.kill()  # SIGKILL: nothing in the process can prepare for it
    written = read_predictions(out)["index"].to_pylist()
    print(f"killed: {len(written)} of {SAMPLES} predictions are written")

    loaded = predict(out, batch_size=64)
    print(f"again: {loaded} samples were loaded, {SAMPLES - loaded} were not predicted again")

    table = read_predictions(out)
    assert table["index"].to_pylist() == list(range(SAMPLES)), "each sample once, in the dataset's order"
    assert loaded == SAMPLES - len(written)
    print(f"{table.num_rows} predictions in {out}, each sample once: {', '.join(table.column_names)}")


if __name__ == "__main__":
    main()
