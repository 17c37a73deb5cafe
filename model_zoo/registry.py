"""The registry of models, their common module class, and the batches that their data loaders yield."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

VOCAB, PAD, LENGTH = 50, 1, 12
Batch = dict[str, Tensor]
Make = Callable[[], Any]
Step = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Entry:
    """An architecture: `make` returns the module, always with the same weights, and batches on the host."""

    name: str
    make: Callable[[], tuple[LightningModule, list[Any]]]


ZOO: dict[str, Entry] = {}
GENERATION: dict[str, Entry] = {}


def register(name: str, module: Make, batch: Make, zoo: dict[str, Entry] = ZOO) -> None:
    def make() -> tuple[LightningModule, list[Any]]:
        torch.manual_seed(0)
        made: LightningModule = module()
        for weight in made.parameters():
            if weight.dim() > 1:  # large enough that outputs depend on inputs, which many first weights are not
                nn.init.kaiming_normal_(weight)
        return made.eval(), [batch() for _ in range(8 if zoo is ZOO else 6)]

    assert name not in zoo
    zoo[name] = Entry(name, make)


class Predictor(LightningModule):
    """A module with these parts, and one of the functions below for its step."""

    def __init__(self, step: Step, **parts: Any) -> None:
        super().__init__()
        self._step = step
        for name, part in parts.items():
            self.register_buffer(name, part) if isinstance(part, Tensor) else setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.get_submodule("model")(x)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self._step(self, batch)


# Batches: what data loaders yield.


def text(rows: int = 3) -> Batch:
    """Sentences, of which the first is the longest, as a tokenizer returns them."""
    lengths = torch.cat([torch.tensor([LENGTH]), torch.randint(3, LENGTH, (rows - 1,))])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"input_ids": torch.randint(4, VOCAB, (rows, LENGTH)).where(mask == 1, PAD), "attention_mask": mask}


def prompt() -> Batch:
    """Padded on the left, where generation wants it."""
    return {name: value.flip(1) for name, value in text().items()}


def text_to_text() -> Batch:
    return text() | {f"decoder_{name}": value for name, value in text().items()}


def frames(*shape: int) -> Batch:
    return {"input_values": torch.randn(2, *shape)}


def speech() -> Batch:
    return {"input_features": torch.randn(2, 16, 40)}


def speech_to_text() -> Batch:
    return speech() | {"decoder_input_ids": text(rows=2)["input_ids"]}


def images(side: int = 32, *frames: int) -> Tensor:
    """Each in another colour."""
    return torch.rand(2, *frames, 3, side, side) * torch.rand(2, *[1 for _ in frames], 3, 1, 1)


def pixels(side: int = 32, *frames: int) -> Batch:
    return {"pixel_values": images(side, *frames)}


def pixels_and_text() -> Batch:
    return pixels() | text(rows=2)


def audio() -> Batch:
    mask = (torch.arange(800) < torch.tensor([[800], [int(torch.randint(400, 800, ()))]])).long()
    return {"input_values": torch.randn(2, 800) * mask, "attention_mask": mask}


def graphs() -> Batch:
    """Two of six nodes as one, like PyTorch Geometric's batches."""
    edges = torch.cat([torch.randint(6, (2, 10)), torch.randint(6, 12, (2, 10))], dim=1)
    return {"x": torch.randn(12, 8), "edge_index": edges, "batch": torch.arange(12) // 6}


def history() -> Batch:
    return {"seen": torch.randint(VOCAB, (3, 6)), "items": torch.randint(VOCAB, (3, 9))}


def numbers(*shape: int) -> Make:
    return lambda: torch.randn(shape)


def padded() -> Batch:
    """Series of vectors, and where there is one."""
    return {"x": torch.randn(3, 10, 8), "mask": torch.arange(10) < torch.randint(3, 11, (3, 1))}
