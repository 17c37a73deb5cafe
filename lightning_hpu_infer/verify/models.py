"""A dozen small models of the kinds that users bring, in plain torch, with their batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from lightning_hpu_infer.verify.ask import host

BATCHES = 6
_ROWS = 4
_WIDTH = 32

Step = Callable[[Any, Any], Any]


class Model(LightningModule):
    """Networks and buffers by name, and a step that uses them."""

    def __init__(self, step: Step, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self._step = step
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_buffer(name, part)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """What the step makes of a batch."""
        return self._step(self, batch)


@dataclass(frozen=True)
class Case:
    """A model with its batches.

    Args:
        make: A new model, with the same weights each time.
        batches: New batches on the host, each time the same.
        precision: Of the Trainer.
    """

    make: Callable[[], Model]
    batches: Callable[[], list[Any]]
    precision: str = "32-true"


CASES: dict[str, Case] = {}


def _case(batches: Callable[[], list[Any]], precision: str = "32-true") -> Callable[[Callable[[], Model]], None]:
    def register(make: Callable[[], Model]) -> None:
        def seeded() -> Model:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return make().eval()

        CASES[make.__name__.strip("_").replace("_", " ")] = Case(seeded, batches, precision)

    return register


def _floats(*shape: int) -> Callable[[], list[Any]]:
    return lambda: [host(_ROWS, *shape, seed=number) for number in range(BATCHES)]


def _tokens() -> list[Any]:
    """Token ids and masks, of two lengths."""
    batches = []
    for number in range(BATCHES):
        length = 16 if number % 3 else 12
        ids = torch.randint(1, 100, (_ROWS, length), generator=torch.Generator().manual_seed(number))
        mask = torch.ones(_ROWS, length, dtype=torch.bool)
        mask[1, length // 2 :] = False
        batches.append({"ids": ids, "mask": mask})
    return batches


def _ragged() -> list[Any]:
    """Rows of three lengths, and a short batch at the end."""
    lengths = [(16, _ROWS), (24, _ROWS)] * 5 + [(8, _ROWS), (16, _ROWS - 1)]
    return [host(rows, length, _WIDTH, seed=number) for number, (length, rows) in enumerate(lengths)]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(_WIDTH, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10))


def _attend(m: Any, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """Attention of four heads, with the weights of `m.qkv`."""
    q, k, v = m.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2).flatten(2)


@_case(_floats(_WIDTH))
def _multilayer_perceptron() -> Model:
    return Model(lambda m, x: m.net(x), net=_mlp())


@_case(_floats(3, 16, 16))
def _convolutional_network() -> Model:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))
    return Model(lambda m, x: m.head(m.body(x).mean((2, 3))), body=body, head=nn.Linear(8, 10))


@_case(_floats(3, 16, 16))
def _image_to_image() -> Model:
    """Returns what a convolution gave, which the device may keep permuted."""
    return Model(lambda m, x: m.net(x), net=nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)))


@_case(_floats(_WIDTH))
def _batch_norm() -> Model:
    norm = nn.BatchNorm1d(_WIDTH)
    norm.running_mean, norm.running_var = host(_WIDTH), host(_WIDTH, seed=1).abs() + 0.5
    return Model(lambda m, x: m.head(m.norm(x)).softmax(-1), norm=norm, head=nn.Linear(_WIDTH, 10))


@_case(_floats(12, _WIDTH))
def _recurrent_network() -> Model:
    return Model(lambda m, x: m.net(x)[0][:, -1], net=nn.LSTM(_WIDTH, 16, batch_first=True))


@_case(_tokens)
def _encoder_with_a_mask() -> Model:
    def step(m: Any, batch: Any) -> Tensor:
        x = m.embed(batch["ids"])
        x = x + m.out(_attend(m, m.norm(x), batch["mask"][:, None, None]))
        weights = batch["mask"].unsqueeze(-1).to(x.dtype)
        return (m.net(x) * weights).sum(1) / weights.sum(1)  # type: ignore[no-any-return]

    return Model(
        step,
        embed=nn.Embedding(100, _WIDTH, padding_idx=0),
        norm=nn.LayerNorm(_WIDTH),
        qkv=nn.Linear(_WIDTH, 3 * _WIDTH),
        out=nn.Linear(_WIDTH, _WIDTH),
        net=_mlp(),
    )


@_case(_floats(12, _WIDTH))
def _decoder_with_a_cache() -> Model:
    """Reads keys and values of earlier tokens from a buffer, and predicts from the last token."""

    def step(m: Any, x: Tensor) -> Tensor:
        past = m.past.expand(len(x), -1, -1)
        return m.head(_attend(m, torch.cat([past, x], 1), causal=True)[:, -1])  # type: ignore[no-any-return]

    return Model(step, qkv=nn.Linear(_WIDTH, 3 * _WIDTH), head=nn.Linear(_WIDTH, 100), past=host(4, _WIDTH))


@_case(_floats(_WIDTH))
def _dictionary_of_outputs() -> Model:
    def step(m: Any, x: Tensor) -> dict[str, Any]:
        logits = m.net(x)
        return {"logits": logits, "scores": [logits.softmax(-1), logits.sigmoid()], "inputs": x}

    return Model(step, net=_mlp())


@_case(_tokens)
def _integer_outputs() -> Model:
    def step(m: Any, batch: Any) -> tuple[Tensor, Tensor]:
        chosen = functional.one_hot(batch["ids"] % 10, 10).float() + 0.01 * m.head(m.embed(batch["ids"])).tanh()
        return chosen.argmax(-1), batch["ids"] * 2 + 1

    return Model(step, embed=nn.Embedding(100, _WIDTH), head=nn.Linear(_WIDTH, 10))


@_case(_ragged)
def _batches_of_several_shapes() -> Model:
    return Model(lambda m, x: m.net(x).mean(1), net=_mlp())


@_case(_floats(_WIDTH), precision="bf16-mixed")
def _mixed_precision() -> Model:
    return Model(lambda m, x: m.net(x), net=_mlp())


@_case(_floats(_WIDTH))
def _state_in_a_buffer() -> Model:
    """Each batch's result depends on those before it."""

    def step(m: Any, x: Tensor) -> Tensor:
        m.total.mul_(0.5).add_(x.mean(0))
        return m.net(x + m.total)  # type: ignore[no-any-return]

    return Model(step, net=_mlp(), total=torch.zeros(_WIDTH))
