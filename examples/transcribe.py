"""Transcribe speech with Wav2Vec2, on stock Lightning and with HPUInferenceAccelerator.

    python -m examples.transcribe                                 # the clips of examples/data/clips
    python -m examples.transcribe a.wav b.flac --weights FOLDER   # yours, with a Wav2Vec2 of Hugging Face's
    LIGHTNING_HPU_INFER_EMULATOR=1 python -m examples.transcribe  # on the emulated HPU

The module and the loader know nothing of the accelerator. Letters become words in `postprocess`, in a pool; clips are
sorted by length, padded to few lengths and come back in their order. Needs the extra `[examples]`.

The weights that come with it were trained by `data/train_transcriber.py` on a synthesizer that speaks 50 words.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from examples.compare import GRAPHS, TECHNIQUES, compare, existing, needs, positive, predict
from lightning_hpu_infer import Pad, PadSpec

with needs("examples", __name__):
    import jiwer
    import soundfile
    from scipy.signal import resample_poly
    from transformers import Wav2Vec2ForCTC, Wav2Vec2Processor

DATA = Path(__file__).parent / "data"
SPEC = PadSpec(inputs={"input_values": Pad(1), "attention_mask": Pad(1)})


class Transcriber(LightningModule):
    """The most probable letter of each frame: `(batch, frames)` int64, the blank where a clip has ended."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.net = Wav2Vec2ForCTC.from_pretrained(weights, dtype=torch.float32)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        letters = self.net(**batch).logits.argmax(-1)
        if "attention_mask" not in batch:
            return letters
        lengths = batch["attention_mask"].sum(1)
        for kernel, stride in zip(self.net.config.conv_kernel, self.net.config.conv_stride, strict=True):
            lengths = (lengths - kernel) // stride + 1
        ended = torch.arange(letters.shape[1], device=letters.device) >= lengths[:, None]
        return letters.masked_fill(ended, self.net.config.pad_token_id)


def read(path: Path, rate: int) -> np.ndarray:
    """The samples of one channel, float32, at a rate in Hz."""
    samples, given = soundfile.read(path, always_2d=True)
    return resample_poly(samples[:, 0], rate, given).astype(np.float32)


def collate(process: Wav2Vec2Processor, waves: list[np.ndarray]) -> dict[str, Tensor]:
    """`input_values` and, if the model wants it, `attention_mask`: `(batch, samples)`."""
    return dict(
        process(waves, sampling_rate=process.feature_extractor.sampling_rate, padding=True, return_tensors="pt")
    )


def clips() -> tuple[list[Path], list[str]]:
    """The files that come with the example, and what is said in them."""
    lines = [line.split("\t") for line in (DATA / "clips" / "clips.tsv").read_text().splitlines()]
    return [DATA / "clips" / name for name, _, _ in lines], [text for _, _, text in lines]


def techniques(module: Transcriber, process: Wav2Vec2Processor) -> dict[str, dict[str, Any]]:
    """Those of all examples, with decoding in a pool, and buckets of length beside them."""
    decode = {"postprocess": process.batch_decode}
    arms = {name: flags | decode for name, flags in TECHNIQUES.items()}
    if module.net.config.feat_extract_norm == "layer":  # a group norm takes its mean over the padding too
        lengths = {"group_by_length": len, "bucket_lengths": "auto", "num_buckets": 4, "pad_spec": SPEC}
        arms["and buckets"] = GRAPHS | decode | lengths
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=existing, help="speech; the clips of examples/data by default")
    parser.add_argument("--weights", type=existing, default=DATA / "transcriber", help="a folder of `save_pretrained`")
    parser.add_argument("--batch-size", type=positive, default=4)
    options = parser.parse_args()
    files, said = (options.files, []) if options.files else clips()
    try:
        process, module = Wav2Vec2Processor.from_pretrained(options.weights), Transcriber(options.weights)
        waves = [read(path, process.feature_extractor.sampling_rate) for path in files]
    except (OSError, soundfile.SoundFileError) as error:  # of a folder without a model, or a file without sound
        parser.error(str(error))
    loader = DataLoader(waves, options.batch_size, collate_fn=partial(collate, process))  # type: ignore[arg-type,var-annotated]

    seconds = sum(map(len, waves)) / process.feature_extractor.sampling_rate

    def run(trainer: Trainer) -> list[str]:
        batches = predict(trainer, module, loader)
        # Stock Lightning has no `postprocess`.
        decoded = (process.batch_decode(each) if isinstance(each, Tensor) else each for each in batches)
        return [text for batch in decoded for text in batch]

    def check(texts: list[str], expected: list[str]) -> None:
        assert texts == expected

    texts = compare(round(seconds, 1), "s of speech", run, check, techniques(module, process))
    for path, text in zip(files, texts, strict=True):
        print(f"{path.name}  {text}")
    if said:
        print(f"word error rate {jiwer.wer(said, texts):.3f}")


if __name__ == "__main__":
    main()
