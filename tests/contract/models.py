"""Small models of the kinds users bring, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from model_zoo.vision import import_timm
from tests.contract.conftest import REAL_DEVICE

TOLERANCE: dict[str, Any] = {"atol": 1e-2, "rtol": 1e-2} if REAL_DEVICE else {"atol": 1e-5, "rtol": 1e-4}
"""Of float32 results against the CPU's: the emulator computes as it does, a Gaudi has its own kernels."""


def hpu() -> Any:
    """Return ``torch.hpu``, which type checkers do not know."""
    return torch.get_device_module("hpu")


Case = tuple[nn.Module, dict[str, Any]]


def _timm(name: str, **options: Any) -> Case:
    try:
        timm: Any = import_timm()
    except ImportError as error:
        pytest.skip(f"timm cannot be imported: {error}")
    return timm.create_model(name, num_classes=10, **options), {"x": torch.randn(2, 3, 64, 64)}


def resnet18() -> Case:
    return _timm("resnet18")


def vit() -> Case:
    return _timm("deit_tiny_patch16_224", img_size=64, depth=3)


def bert() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    mask = torch.ones(3, 16, dtype=torch.int64)
    mask[1:, 10:] = 0
    ids = torch.randint(0, 100, (3, 16))
    return transformers.BertForSequenceClassification(config), {"input_ids": ids, "attention_mask": mask}


def wav2vec2() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=20,
    )
    return transformers.Wav2Vec2ForCTC(config), {"input_values": torch.randn(2, 2000)}


MODELS: dict[str, Callable[[], Case]] = {"resnet18": resnet18, "vit": vit, "bert": bert, "wav2vec2": wav2vec2}
