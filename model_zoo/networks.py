"""Networks of torch.nn."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from model_zoo.registry import VOCAB, Batch, Make, Predictor, Step, graphs, history, images, numbers, padded, register


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for one, other in pairwise(widths) for layer in (nn.Linear(one, other), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def convolution(one: int, other: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(one, other, 3, stride, 1, bias=False), nn.BatchNorm2d(other), nn.ReLU())


def cnn() -> nn.Sequential:
    return nn.Sequential(convolution(3, 8, 2), convolution(8, 16, 2), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, 5))


def encoder(layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Skip(nn.Sequential):
    """Beside its input what layers make of it at half the resolution, as in a U-Net."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([input, F.interpolate(super().forward(input), scale_factor=2)], dim=1)


class Denoiser(nn.Sequential):
    def forward(self, x: Tensor, t: int) -> Tensor:  # type: ignore[override]
        return super().forward(x + math.sin(t))


def unet_parts() -> dict[str, nn.Module]:
    inner = Skip(convolution(16, 32, 2), convolution(32, 32))
    outer = Skip(convolution(8, 16, 2), inner, convolution(48, 16))
    return {"model": nn.Sequential(convolution(3, 8), outer, nn.Conv2d(24, 3, 1))}


def denoiser_parts() -> dict[str, Any]:
    model = Denoiser(convolution(3, 8), nn.Conv2d(8, 3, 3, padding=1))
    return {"model": model, "alphas": torch.linspace(1, 0.9, 40).cumprod(0)}


def add(batch: Make, parts: Make) -> Callable[[Step], Step]:
    """Register a step under its name, with the parts of its module."""

    def decorate(step: Step) -> Step:
        register(step.__name__, lambda: Predictor(step, **parts()), batch)
        return step

    return decorate


class Networks:
    """Steps around networks of torch.nn."""

    @add(numbers(3, 8), lambda: {"model": mlp(8, 32, 4)})
    def mlp(self: Any, batch: Tensor) -> Tensor:
        return self(batch)

    @add(images, lambda: {"model": cnn()})
    def cnn(self: Any, batch: Tensor) -> Tensor:
        return self(batch).log_softmax(dim=-1)

    @add(graphs, lambda: {"message": mlp(16, 32, 8), "update": nn.GRUCell(8, 8), "head": nn.Linear(16, 3)})
    def message_passing(self: Any, batch: Batch) -> Tensor:
        x, (source, target), index = batch["x"], batch["edge_index"], batch["batch"].unsqueeze(1).expand(-1, 8)
        for _ in range(2):
            sent = self.message(torch.cat([x[source], x[target]], dim=-1))
            x = self.update(torch.zeros_like(x).index_add(0, target, sent), x)
        pools = [x.new_zeros(2, 8).scatter_reduce(0, index, x, how, include_self=False) for how in ("mean", "amax")]
        return self.head(torch.cat(pools, dim=1))

    @add(lambda: torch.randint(VOCAB, (3, 10)), lambda: {"words": nn.Embedding(VOCAB, 16), "lstm": nn.LSTM(16, 4, 2)})
    def lstm(self: Any, batch: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.words(batch).transpose(0, 1))
        return hidden[-1].log_softmax(dim=-1)

    @add(padded, lambda: {"gru": nn.GRU(8, 16, batch_first=True), "head": nn.Linear(16, 8)})
    def gru(self: Any, batch: Batch) -> Tensor:
        states, _ = self.gru(batch["x"])
        return self.head(states[torch.arange(len(states), device=self.device), batch["mask"].sum(1) - 1])

    @add(padded, lambda: {"lstm": nn.LSTM(8, 8, batch_first=True, bidirectional=True), "head": nn.Linear(16, 4)})
    def bidirectional_lstm(self: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        states = self.lstm(batch["x"])[0].masked_fill(~batch["mask"].unsqueeze(-1), float("-inf"))
        return self.head(states.amax(dim=1)).sigmoid(), states.amax(dim=1)

    @add(padded, lambda: {"lstm": nn.LSTM(8, 8, batch_first=True)})
    def packed_lstm(self: Any, batch: Batch) -> Tensor:
        lengths = batch["mask"].sum(dim=1).cpu()  # where torch wants them
        packed = pack_padded_sequence(batch["x"], lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=10)[0]

    @add(padded, lambda: {"cls": nn.Parameter(torch.randn(1, 1, 8)), "encoder": encoder(2)})
    def transformer_encoder(self: Any, batch: Batch) -> Tensor:
        x = torch.cat([self.cls.expand(len(batch["x"]), -1, -1), batch["x"]], dim=1)
        return self.encoder(x, src_key_padding_mask=F.pad(~batch["mask"], (1, 0)))[:, 0]

    @add(padded, lambda: {"model": nn.Transformer(8, 2, 1, 1, 32, custom_encoder=encoder(1), batch_first=True)})
    def transformer(self: Any, batch: Batch) -> Tensor:
        padding, target = ~batch["mask"], batch["x"][:, -4:]
        causal = nn.Transformer.generate_square_subsequent_mask(4, device=self.device, dtype=torch.bool)
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return self.model(batch["x"], target, tgt_mask=causal, **masks)

    @add(images, unet_parts)
    def unet(self: Any, batch: Tensor) -> Batch:
        probabilities = self.model(batch).softmax(dim=1)
        return {"mask": probabilities.argmax(dim=1), "area": probabilities.mean(dim=(2, 3))}

    @add(images, lambda: {"encoder": convolution(3, 4, 2), "decoder": nn.Conv2d(4, 12, 3, 1, 1)})
    def autoencoder(self: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        decoded = F.pixel_shuffle(self.decoder(self.encoder(batch)), 2).sigmoid()
        return decoded, F.mse_loss(decoded, batch, reduction="none").mean(dim=(1, 2, 3))

    @add(numbers(3, 8), lambda: {"encoder": mlp(8, 32, 8), "decoder": mlp(4, 32, 8)})
    def vae(self: Any, batch: Tensor) -> Batch:
        mean, logarithm = self.encoder(batch).chunk(2, dim=-1)
        divergence = -0.5 * (1 + logarithm - mean.square() - logarithm.exp()).sum(-1)
        return {"decoded": self.decoder(mean), "mean": mean, "kl": divergence}

    @add(lambda: (images(), images()), lambda: {"tower": cnn()})
    def siamese(self: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        left, right = (self.tower(each) for each in batch)
        return F.pairwise_distance(left, right)

    @add(images, lambda: {"networks": nn.ModuleList([cnn() for _ in range(3)])})
    def ensemble(self: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        votes = torch.stack([network(batch).softmax(dim=-1) for network in self.networks])
        return votes.mean(dim=0), votes.std(dim=0)

    @add(numbers(3, 8), lambda: {"gate": mlp(8, 4), "experts": nn.ModuleList([mlp(8, 16, 8) for _ in range(4)])})
    def soft_mixture(self: Any, batch: Tensor) -> Batch:
        weights = self.gate(batch).softmax(dim=-1)
        outputs = torch.stack([expert(batch) for expert in self.experts], dim=1)
        return {"output": torch.einsum("be,bed->bd", weights, outputs), "weights": weights}

    @add(numbers(2, 3, 16, 16), denoiser_parts)
    def diffusion_loop(self: Any, batch: Tensor) -> Tensor:
        for t in range(30, 0, -10):
            now, then, noise = self.alphas[t], self.alphas[t - 10], self.model(batch, t=t)
            batch = then.sqrt() * (batch - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
        return batch.clamp(-1, 1)

    @add(history, lambda: {"seen": nn.EmbeddingBag(VOCAB, 16), "tower": mlp(16, 16), "items": nn.Embedding(VOCAB, 16)})
    def two_towers(self: Any, batch: Batch) -> Batch:
        user = self.tower(self.seen(batch["seen"]))
        best = (self.items(batch["items"]) @ user.unsqueeze(-1)).squeeze(-1).topk(3)
        return {"items": batch["items"].gather(1, best.indices), "scores": best.values.sigmoid()}

    @add(numbers(3, 8, 20), lambda: {"layers": nn.ModuleList([nn.Conv1d(8, 8, 3, dilation=n) for n in (1, 2, 4)])})
    def temporal_convolution(self: Any, batch: Tensor) -> Tensor:
        for layer in self.layers:
            batch = batch + layer(F.pad(batch, (2 * layer.dilation[0], 0))).relu()
        return batch[..., -1]

    @add(images, lambda: {"patches": nn.Conv2d(3, 16, 8, 8), "tokens": mlp(16, 32, 16), "channels": mlp(16, 32, 16)})
    def mlp_mixer(self: Any, batch: Tensor) -> Tensor:
        x = self.patches(batch).flatten(2)
        x = x + self.tokens(F.layer_norm(x, x.shape[-1:]))
        x = x.transpose(1, 2)
        return (x + self.channels(F.layer_norm(x, x.shape[-1:]))).mean(dim=1)

    @add(padded, lambda: {"phi": mlp(8, 32, 16), "rho": mlp(32, 32, 2)})
    def deep_sets(self: Any, batch: Batch) -> list[Tensor]:
        elements, mask = self.phi(batch["x"]), batch["mask"].unsqueeze(-1)
        pooled = [(elements * mask).sum(dim=1) / mask.sum(dim=1), elements.where(mask, -1e9).amax(dim=1)]
        return [self.rho(torch.cat(pooled, dim=-1)), *pooled]

    @add(numbers(2, 6, 8), lambda: {"weight": nn.Parameter(torch.randn(6, 4, 8, 5) / 3)})
    def capsules(self: Any, batch: Tensor) -> Tensor:
        votes = torch.einsum("bid,ijdk->bijk", batch, self.weight)
        routing = votes.new_zeros(votes.shape[:3])
        for _ in range(3):
            total = torch.einsum("bij,bijk->bjk", routing.softmax(dim=2), votes)
            routing = routing + torch.einsum("bijk,bjk->bij", votes, F.normalize(total, dim=-1))
        return total.norm(dim=-1)

    @add(lambda: torch.rand(3, 20, 2), lambda: {"frequencies": torch.randn(2, 16), "model": mlp(32, 32, 3)})
    def fourier_features(self: Any, batch: Tensor) -> Tensor:
        angles = 2 * torch.pi * batch @ self.frequencies
        return self.model(torch.cat([angles.sin(), angles.cos()], dim=-1)).sigmoid()

    @add(images, lambda: {"body": convolution(3, 16, 4), "head": nn.Conv2d(16, 8, 1), "grid": torch.arange(2.0, 32, 4)})
    def detector(self: Any, batch: Tensor) -> Batch:
        """Boxes relative to anchors; the best five per image, as torchvision's detectors name them."""
        logits, shift, size = self.head(self.body(batch)).flatten(2).transpose(1, 2).split([4, 2, 2], dim=-1)
        best, labels = logits.sigmoid().max(dim=-1)
        centre, size = torch.cartesian_prod(self.grid, self.grid) + shift * 4, size.exp() * 4
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 32)
        scores, index = best.topk(5, dim=1)
        boxes = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        return {"boxes": boxes, "labels": labels.gather(1, index), "scores": scores}
