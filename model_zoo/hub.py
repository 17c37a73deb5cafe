"""Networks of transformers and timm."""

from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from model_zoo.registry import (
    GENERATION,
    PAD,
    VOCAB,
    ZOO,
    Batch,
    Make,
    Predictor,
    Step,
    audio,
    frames,
    images,
    pixels,
    pixels_and_text,
    prompt,
    register,
    speech,
    speech_to_text,
    text,
    text_to_text,
)
from model_zoo.vision import import_timm


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
