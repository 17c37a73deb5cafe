"""Architectures as users bring them: `ZOO` with a forward per batch, `GENERATION` with `generate()`.

Weights are random, sizes tiny, and nothing is downloaded. The steps are written as in a notebook: nothing in them knows
of the accelerator; masks, caches and types are what tokenizers and networks have by default.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.vision import import_timm

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
    """Each in a colour of its own."""
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


class Steps:
    """Around networks of transformers."""

    def embed(self: Any, batch: Batch) -> Tensor:
        states = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=-1)

    def first(self: Any, batch: Batch) -> Tensor:
        return self.model(**batch).last_hidden_state[:, 0]

    def layers(self: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        states = self.model(**batch, output_hidden_states=True).hidden_states
        return torch.stack(states[-2:]).mean(0), list(states)

    def classify(self: Any, batch: Batch) -> Batch:
        probabilities = self.model(**batch).logits.softmax(dim=-1)
        confidence, label = probabilities.max(dim=-1)
        return {"label": label, "confidence": confidence, "probabilities": probabilities}

    def tag(self: Any, batch: Batch) -> Tensor:
        return self.model(**batch).logits.argmax(-1).masked_fill(batch["attention_mask"] == 0, -100)

    def answer(self: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        outputs, padding = self.model(**batch), ~batch["attention_mask"].bool()
        start, end = (each.masked_fill(padding, -1e4) for each in (outputs.start_logits, outputs.end_logits))
        spans = (start[:, :, None] + end[:, None, :]).triu().flatten(1)
        return start.argmax(1), end.argmax(1), spans.softmax(1).amax(1)

    def next_token(self: Any, batch: Batch) -> Tensor:
        logits = self.model(**batch).logits
        last = batch["attention_mask"].sum(dim=1) - 1
        return logits[torch.arange(len(logits), device=self.device), last].softmax(dim=-1)

    def score(self: Any, batch: Batch) -> Batch:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["logits"]
        targets, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
        likelihood = logits[:, :-1].log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1) * mask
        return {"log_likelihood": likelihood, "per_token": likelihood.sum(1) / mask.sum(1)}

    def translate(self: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = self.model(**batch)
        return outputs.logits.argmax(dim=-1), outputs.encoder_last_hidden_state

    def similarity(self: Any, batch: Batch) -> Batch:
        outputs = self.model(**batch)
        return {"scores": outputs.logits_per_image, "image": outputs.image_embeds, "text": outputs.text_embeds}

    def towers(self: Any, batch: Batch) -> Tensor:
        # One by one, not through the network's `forward`.
        image = self.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
        words = self.model.get_text_features(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
        return 100.0 * F.normalize(image, dim=-1) @ F.normalize(words, dim=-1).T

    def detect(self: Any, batch: Batch) -> Batch:
        outputs = self.model(**batch)
        scores, labels = outputs.logits.softmax(-1)[..., :-1].max(-1)
        centre, size = outputs.pred_boxes.chunk(2, dim=-1)
        return {"scores": scores, "labels": labels, "boxes": torch.cat([centre - size / 2, centre + size / 2], dim=-1)}

    def segment(self: Any, batch: Batch) -> Tensor:
        logits, size = self.model(**batch).logits, batch["pixel_values"].shape[-2:]
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1)

    def transcribe(self: Any, batch: Batch) -> Tensor:
        return self.model(batch["input_values"], attention_mask=batch["attention_mask"]).logits.argmax(-1)

    def generate(self: Any, batch: Batch, **options: Any) -> Tensor:
        return self.model.generate(**batch, max_new_tokens=6, do_sample=False, **options)


# Networks of transformers. They pass over settings of others.

IDS = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
TOKENS: dict[str, Any] = {"vocab_size": VOCAB} | IDS
LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
OTHERS = {"hidden_dim": 48, "ffn_dim": 48, "word_embed_proj_dim": 32, "attention_window": 4, "sliding_window": 8}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
TEXT = TOKENS | LAYERS | OTHERS | RELATIVE | {"max_position_embeddings": 40, "attention_type": "original_full"}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
T5 = TOKENS | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": PAD}
SIDES = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4))}
FEED = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "d_model": 32, "decoder_start_token_id": 2}
BART = TOKENS | SIDES | FEED | {"max_position_embeddings": 40, "forced_eos_token_id": None}
VIT = LAYERS | {"image_size": 32, "patch_size": 8}
CLIP: dict[str, Any] = {"text_config": TEXT, "vision_config": VIT, "projection_dim": 16}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
STAGES: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2, "embedding_size": 16}
BACKBONE = STAGES | {"model_type": "resnet", "layer_type": "basic", "out_features": ["stage2"]}
DETR = SIDES | FEED | {"backbone_config": BACKBONE, "use_timm_backbone": False, "num_queries": 5}
STRIDES = {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
SEGFORMER = STAGES | STRIDES | {"num_attention_heads": [1, 2], "num_encoder_blocks": 2, "decoder_hidden_size": 16}
VIDEO = LAYERS | {"image_size": 16, "patch_size": 8, "num_frames": 4}
KERNELS = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "vocab_size": VOCAB}
SPEECH = LAYERS | KERNELS | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
AST = LAYERS | {"num_mel_bins": 16, "max_length": 40, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
FRAMES = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 40}
WHISPER = BART | FRAMES | {"suppress_tokens": None, "begin_suppress_tokens": None}


def hub(step: Step, batch: Make, head: str, settings: dict[str, Any], *kinds: str, name: str = "") -> None:
    """Register networks with the same head, under their kinds and the step's name; with a name, for generation."""

    def module(kind: str) -> Predictor:
        config = transformers.AutoConfig.for_model(kind, **settings)
        return Predictor(step, model=getattr(transformers, f"AutoModel{head}").from_config(config))

    for kind in kinds:
        full = f"{kind.replace('-', '_')}_{name or step.__name__}"
        register(full, partial(module, kind), batch, GENERATION if name else ZOO)


hub(Steps.embed, text, "", TEXT, "bert", "albert", "mpnet", "modernbert")
hub(Steps.embed, text, "ForTextEncoding", T5, "t5")
hub(Steps.first, text, "", TEXT, "roberta", "longformer", "big_bird")
hub(Steps.layers, text, "", GROUPED, "bert", "llama")
hub(Steps.classify, text, "ForSequenceClassification", TEXT, "bert", "distilbert", "deberta-v2", "gpt2")
hub(Steps.tag, text, "ForTokenClassification", TEXT, "electra", "xlm-roberta")
hub(Steps.answer, text, "ForQuestionAnswering", TEXT, "bert")
hub(Steps.next_token, text, "ForCausalLM", TEXT, "gpt2", "phi", "falcon")
hub(Steps.next_token, text, "ForCausalLM", GROUPED, "llama", "qwen2", "gemma", "mixtral", "mistral")
hub(Steps.score, text, "ForCausalLM", TEXT, "gpt_neox", "bloom", "opt", "mamba")
hub(Steps.translate, text_to_text, "ForSeq2SeqLM", T5, "t5")
hub(Steps.translate, text_to_text, "ForSeq2SeqLM", BART, "bart", "marian", "pegasus")
hub(Steps.classify, pixels, "ForImageClassification", VIT, "vit")
hub(Steps.first, pixels, "", VIT, "deit")
hub(Steps.classify, pixels, "ForImageClassification", SWIN, "swin")
hub(Steps.classify, pixels, "ForImageClassification", STAGES, "convnext", "resnet")
hub(Steps.detect, pixels, "ForObjectDetection", DETR, "detr")
hub(Steps.segment, pixels, "ForSemanticSegmentation", SEGFORMER, "segformer")
hub(Steps.similarity, pixels_and_text, "", CLIP, "clip", "siglip")
hub(Steps.towers, pixels_and_text, "", CLIP, "clip", "siglip")
hub(Steps.classify, partial(pixels, 16, 4), "ForVideoClassification", VIDEO, "timesformer", "videomae")
hub(Steps.transcribe, audio, "ForCTC", SPEECH, "wav2vec2", "hubert")
hub(Steps.layers, partial(frames, 800), "", SPEECH, "wavlm")
hub(Steps.classify, partial(frames, 40, 16), "ForAudioClassification", AST, "audio-spectrogram-transformer")
hub(Steps.classify, speech, "ForAudioClassification", WHISPER, "whisper")  # the encoder
hub(Steps.translate, speech_to_text, "ForSpeechSeq2Seq", WHISPER, "whisper")

hub(Steps.generate, prompt, "ForCausalLM", TEXT, "gpt2", name="greedy")
static = partial(Steps.generate, cache_implementation="static")
hub(static, prompt, "ForCausalLM", GROUPED, "llama", name="static_cache")
hub(Steps.generate, text, "ForSeq2SeqLM", T5, "t5", name="greedy")
hub(partial(Steps.generate, num_beams=2), text, "ForSeq2SeqLM", BART, "bart", name="beams")
hub(Steps.generate, speech, "ForSpeechSeq2Seq", WHISPER, "whisper", name="greedy")

# Networks of timm, on photos as a camera delivers them, with ImageNet's mean and standard deviation.


def photos(self: Any, batch: Tensor) -> Batch:
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=self.device).view(2, 3, 1, 1)
    top = self.model((batch / 255 - mean) / std).softmax(dim=1).topk(3)
    return {"classes": top.indices, "probabilities": top.values}


def timm(name: str, **settings: Any) -> None:
    def module() -> Predictor:
        return Predictor(photos, model=import_timm().create_model(name, **settings))

    register(f"timm_{name}", module, lambda: (images() * 256).to(torch.uint8))


timm("resnet18")
timm("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
timm("mobilenetv3_small_050")
timm("convnext_atto")

# Networks of torch.nn.


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


def own(batch: Make, parts: Make) -> Callable[[Step], Step]:
    """Register a step under its name, with the parts of its module."""

    def decorate(step: Step) -> Step:
        register(step.__name__, lambda: Predictor(step, **parts()), batch)
        return step

    return decorate


class Own:
    """Steps around networks of torch.nn."""

    @own(numbers(3, 8), lambda: {"model": mlp(8, 32, 4)})
    def mlp(self: Any, batch: Tensor) -> Tensor:
        return self(batch)

    @own(images, lambda: {"model": cnn()})
    def cnn(self: Any, batch: Tensor) -> Tensor:
        return self(batch).log_softmax(dim=-1)

    @own(graphs, lambda: {"message": mlp(16, 32, 8), "update": nn.GRUCell(8, 8), "head": nn.Linear(16, 3)})
    def message_passing(self: Any, batch: Batch) -> Tensor:
        x, (source, target), index = batch["x"], batch["edge_index"], batch["batch"].unsqueeze(1).expand(-1, 8)
        for _ in range(2):
            sent = self.message(torch.cat([x[source], x[target]], dim=-1))
            x = self.update(torch.zeros_like(x).index_add(0, target, sent), x)
        pools = [x.new_zeros(2, 8).scatter_reduce(0, index, x, how, include_self=False) for how in ("mean", "amax")]
        return self.head(torch.cat(pools, dim=1))

    @own(lambda: torch.randint(VOCAB, (3, 10)), lambda: {"words": nn.Embedding(VOCAB, 16), "lstm": nn.LSTM(16, 4, 2)})
    def lstm(self: Any, batch: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.words(batch).transpose(0, 1))
        return hidden[-1].log_softmax(dim=-1)

    @own(padded, lambda: {"gru": nn.GRU(8, 16, batch_first=True), "head": nn.Linear(16, 8)})
    def gru(self: Any, batch: Batch) -> Tensor:
        states, _ = self.gru(batch["x"])
        return self.head(states[torch.arange(len(states), device=self.device), batch["mask"].sum(1) - 1])

    @own(padded, lambda: {"lstm": nn.LSTM(8, 8, batch_first=True, bidirectional=True), "head": nn.Linear(16, 4)})
    def bidirectional_lstm(self: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        states = self.lstm(batch["x"])[0].masked_fill(~batch["mask"].unsqueeze(-1), float("-inf"))
        return self.head(states.amax(dim=1)).sigmoid(), states.amax(dim=1)

    @own(padded, lambda: {"lstm": nn.LSTM(8, 8, batch_first=True)})
    def packed_lstm(self: Any, batch: Batch) -> Tensor:
        lengths = batch["mask"].sum(dim=1).cpu()  # where torch wants them
        packed = pack_padded_sequence(batch["x"], lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=10)[0]

    @own(padded, lambda: {"cls": nn.Parameter(torch.randn(1, 1, 8)), "encoder": encoder(2)})
    def transformer_encoder(self: Any, batch: Batch) -> Tensor:
        x = torch.cat([self.cls.expand(len(batch["x"]), -1, -1), batch["x"]], dim=1)
        return self.encoder(x, src_key_padding_mask=F.pad(~batch["mask"], (1, 0)))[:, 0]

    @own(padded, lambda: {"model": nn.Transformer(8, 2, 1, 1, 32, custom_encoder=encoder(1), batch_first=True)})
    def transformer(self: Any, batch: Batch) -> Tensor:
        padding, target = ~batch["mask"], batch["x"][:, -4:]
        causal = nn.Transformer.generate_square_subsequent_mask(4, device=self.device, dtype=torch.bool)
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return self.model(batch["x"], target, tgt_mask=causal, **masks)

    @own(images, unet_parts)
    def unet(self: Any, batch: Tensor) -> Batch:
        probabilities = self.model(batch).softmax(dim=1)
        return {"mask": probabilities.argmax(dim=1), "area": probabilities.mean(dim=(2, 3))}

    @own(images, lambda: {"encoder": convolution(3, 4, 2), "decoder": nn.Conv2d(4, 12, 3, 1, 1)})
    def autoencoder(self: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        decoded = F.pixel_shuffle(self.decoder(self.encoder(batch)), 2).sigmoid()
        return decoded, F.mse_loss(decoded, batch, reduction="none").mean(dim=(1, 2, 3))

    @own(numbers(3, 8), lambda: {"encoder": mlp(8, 32, 8), "decoder": mlp(4, 32, 8)})
    def vae(self: Any, batch: Tensor) -> Batch:
        mean, logarithm = self.encoder(batch).chunk(2, dim=-1)
        divergence = -0.5 * (1 + logarithm - mean.square() - logarithm.exp()).sum(-1)
        return {"decoded": self.decoder(mean), "mean": mean, "kl": divergence}

    @own(lambda: (images(), images()), lambda: {"tower": cnn()})
    def siamese(self: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        left, right = (self.tower(each) for each in batch)
        return F.pairwise_distance(left, right)

    @own(images, lambda: {"networks": nn.ModuleList([cnn() for _ in range(3)])})
    def ensemble(self: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        votes = torch.stack([network(batch).softmax(dim=-1) for network in self.networks])
        return votes.mean(dim=0), votes.std(dim=0)

    @own(numbers(3, 8), lambda: {"gate": mlp(8, 4), "experts": nn.ModuleList([mlp(8, 16, 8) for _ in range(4)])})
    def soft_mixture(self: Any, batch: Tensor) -> Batch:
        weights = self.gate(batch).softmax(dim=-1)
        outputs = torch.stack([expert(batch) for expert in self.experts], dim=1)
        return {"output": torch.einsum("be,bed->bd", weights, outputs), "weights": weights}

    @own(numbers(2, 3, 16, 16), denoiser_parts)
    def diffusion_loop(self: Any, batch: Tensor) -> Tensor:
        for t in range(30, 0, -10):
            now, then, noise = self.alphas[t], self.alphas[t - 10], self.model(batch, t=t)
            batch = then.sqrt() * (batch - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
        return batch.clamp(-1, 1)

    @own(history, lambda: {"seen": nn.EmbeddingBag(VOCAB, 16), "tower": mlp(16, 16), "items": nn.Embedding(VOCAB, 16)})
    def two_towers(self: Any, batch: Batch) -> Batch:
        user = self.tower(self.seen(batch["seen"]))
        best = (self.items(batch["items"]) @ user.unsqueeze(-1)).squeeze(-1).topk(3)
        return {"items": batch["items"].gather(1, best.indices), "scores": best.values.sigmoid()}

    @own(numbers(3, 8, 20), lambda: {"layers": nn.ModuleList([nn.Conv1d(8, 8, 3, dilation=n) for n in (1, 2, 4)])})
    def temporal_convolution(self: Any, batch: Tensor) -> Tensor:
        for layer in self.layers:
            batch = batch + layer(F.pad(batch, (2 * layer.dilation[0], 0))).relu()
        return batch[..., -1]

    @own(images, lambda: {"patches": nn.Conv2d(3, 16, 8, 8), "tokens": mlp(16, 32, 16), "channels": mlp(16, 32, 16)})
    def mlp_mixer(self: Any, batch: Tensor) -> Tensor:
        x = self.patches(batch).flatten(2)
        x = x + self.tokens(F.layer_norm(x, x.shape[-1:]))
        x = x.transpose(1, 2)
        return (x + self.channels(F.layer_norm(x, x.shape[-1:]))).mean(dim=1)

    @own(padded, lambda: {"phi": mlp(8, 32, 16), "rho": mlp(32, 32, 2)})
    def deep_sets(self: Any, batch: Batch) -> list[Tensor]:
        elements, mask = self.phi(batch["x"]), batch["mask"].unsqueeze(-1)
        pooled = [(elements * mask).sum(dim=1) / mask.sum(dim=1), elements.where(mask, -1e9).amax(dim=1)]
        return [self.rho(torch.cat(pooled, dim=-1)), *pooled]

    @own(numbers(2, 6, 8), lambda: {"weight": nn.Parameter(torch.randn(6, 4, 8, 5) / 3)})
    def capsules(self: Any, batch: Tensor) -> Tensor:
        votes = torch.einsum("bid,ijdk->bijk", batch, self.weight)
        routing = votes.new_zeros(votes.shape[:3])
        for _ in range(3):
            total = torch.einsum("bij,bijk->bjk", routing.softmax(dim=2), votes)
            routing = routing + torch.einsum("bijk,bjk->bij", votes, F.normalize(total, dim=-1))
        return total.norm(dim=-1)

    @own(lambda: torch.rand(3, 20, 2), lambda: {"frequencies": torch.randn(2, 16), "model": mlp(32, 32, 3)})
    def fourier_features(self: Any, batch: Tensor) -> Tensor:
        angles = 2 * torch.pi * batch @ self.frequencies
        return self.model(torch.cat([angles.sin(), angles.cos()], dim=-1)).sigmoid()

    @own(images, lambda: {"body": convolution(3, 16, 4), "head": nn.Conv2d(16, 8, 1), "grid": torch.arange(2.0, 32, 4)})
    def detector(self: Any, batch: Tensor) -> Batch:
        """Boxes relative to anchors; the best five per image, as torchvision's detectors name them."""
        logits, shift, size = self.head(self.body(batch)).flatten(2).transpose(1, 2).split([4, 2, 2], dim=-1)
        best, labels = logits.sigmoid().max(dim=-1)
        centre, size = torch.cartesian_prod(self.grid, self.grid) + shift * 4, size.exp() * 4
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1).clamp(0, 32)
        scores, index = best.topk(5, dim=1)
        boxes = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        return {"boxes": boxes, "labels": labels.gather(1, index), "scores": scores}
