"""Autocast by the bridge's lists of ops (bridge: hpu_ops/autocast_helpers.h:33-133)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.contract.models import hpu

pytestmark = pytest.mark.usefixtures("hpu")


@pytest.mark.parametrize("inference", [False, True])
def test_matmuls_run_in_bfloat16(inference: bool) -> None:
    net = nn.Linear(4, 4).to("hpu")
    x = torch.randn(2, 4).to("hpu")
    with torch.inference_mode(inference), torch.no_grad():
        with torch.autocast("hpu", dtype=torch.bfloat16):
            assert hpu().is_autocast_hpu_enabled()
            assert net(x).dtype is torch.bfloat16
            assert (x @ x.t()).dtype is torch.bfloat16
            assert (x + 1).dtype is torch.float32
            assert torch.einsum("ij,kj->ik", x, x).dtype is torch.bfloat16  # made of ops of the list
            with torch.autocast("hpu", enabled=False):
                assert net(x).dtype is torch.float32
        assert not hpu().is_autocast_hpu_enabled()
        assert net(x).dtype is torch.float32


def test_results_are_close_to_float32() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("hpu", dtype=torch.bfloat16):
            result = net.to("hpu")(x.to("hpu"))
    torch.testing.assert_close(result.float().cpu(), expected, atol=0.05, rtol=0.05)


def _x(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.rand(shape or (4, 4)) * 0.5 + 0.25).to(dtype).to("hpu")


def _classes() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3]).to("hpu")


# Each op of a list, with operands of the dtype that is asked for.
LOWER: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "addmm": lambda d: torch.addmm(_x(d), _x(d), _x(d)),
    "addbmm": lambda d: torch.addbmm(_x(d), _x(d, 2, 4, 4), _x(d, 2, 4, 4)),
    "batch_norm": lambda d: F.batch_norm(_x(d), _x(torch.float32, 4), _x(torch.float32, 4)),
    "baddbmm": lambda d: torch.baddbmm(_x(d, 2, 4, 4), _x(d, 2, 4, 4), _x(d, 2, 4, 4)),
    "bmm": lambda d: torch.bmm(_x(d, 2, 4, 4), _x(d, 2, 4, 4)),
    "conv1d": lambda d: F.conv1d(_x(d, 1, 2, 5), _x(d, 3, 2, 3)),
    "conv1d.padding": lambda d: F.conv1d(_x(d, 1, 2, 5), _x(d, 3, 2, 3), padding="same"),
    "conv2d": lambda d: F.conv2d(_x(d, 1, 2, 5, 5), _x(d, 3, 2, 3, 3)),
    "conv3d": lambda d: F.conv3d(_x(d, 1, 2, 5, 5, 5), _x(d, 3, 2, 3, 3, 3)),
    "conv_transpose1d": lambda d: F.conv_transpose1d(_x(d, 1, 2, 5), _x(d, 2, 3, 3)),
    "conv_transpose2d": lambda d: F.conv_transpose2d(_x(d, 1, 2, 5, 5), _x(d, 2, 3, 3, 3)),
    "conv_transpose3d": lambda d: F.conv_transpose3d(_x(d, 1, 2, 5, 5, 5), _x(d, 2, 3, 3, 3, 3)),
    "dot": lambda d: torch.dot(_x(d, 4), _x(d, 4)),
    "dropout": lambda d: F.dropout(_x(d), 0.5, training=True),
    "feature_dropout": lambda d: torch.feature_dropout(_x(d), 0.5, True),
    "group_norm": lambda d: F.group_norm(_x(d), 2, _x(torch.float32, 4), _x(torch.float32, 4)),
    "instance_norm": lambda d: F.instance_norm(_x(d, 1, 2, 5), weight=_x(torch.float32, 2)),
    "layer_norm": lambda d: F.layer_norm(_x(d), (4,), _x(torch.float32, 4), _x(torch.float32, 4)),
    "leaky_relu": lambda d: F.leaky_relu(_x(d)),
    "linear": lambda d: F.linear(_x(d), _x(d), _x(d, 4)),
    "matmul": lambda d: _x(d) @ _x(d),
    "mean": lambda d: _x(d).mean(),
    "mean.dim": lambda d: _x(d).mean(-1),
    "mm": lambda d: torch.mm(_x(d), _x(d)),
    "mul": lambda d: _x(d) * _x(d),
    "mul by a number": lambda d: _x(d) * 0.5,
    "mv": lambda d: torch.mv(_x(d), _x(d, 4)),
    "softmax": lambda d: _x(d).softmax(-1),
    "log_softmax": lambda d: F.log_softmax(_x(d), -1),
    "scaled_dot_product_attention": lambda d: F.scaled_dot_product_attention(
        _x(d, 1, 2, 4, 4), _x(d, 1, 2, 4, 4), _x(d, 1, 2, 4, 4), _x(d, 1, 1, 4, 4)
    ),
}
UNARY = "acos asin cosh erfinv exp expm1 log log10 log1p log2 reciprocal rsqrt sinh tan pdist"
BINARY = "atan2 cdist cosine_similarity dist div divide pow true_divide"
LOSSES = (
    "binary_cross_entropy binary_cross_entropy_with_logits hinge_embedding_loss huber_loss l1_loss mse_loss"
    " poisson_nll_loss smooth_l1_loss soft_margin_loss"
)
FLOAT32: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    **{
        name: (lambda d, name=name: getattr(torch, name)(_x(d)))  # type: ignore[misc]
        for name in UNARY.split()
    },
    **{
        name: (lambda d, name=name: getattr(torch, name)(_x(d), _x(d)))  # type: ignore[misc]
        for name in BINARY.split()
    },
    **{
        name: (lambda d, name=name: getattr(F, name)(_x(d), _x(d)))  # type: ignore[misc]
        for name in LOSSES.split()
    },
    "kl_div": lambda d: F.kl_div(_x(d), _x(d), reduction="sum"),
    "addcdiv": lambda d: torch.addcdiv(_x(d), _x(d), _x(d)),
    "bilinear": lambda d: F.bilinear(_x(d), _x(d), _x(d, 2, 4, 4)),
    "cosine_embedding_loss": lambda d: F.cosine_embedding_loss(_x(d), _x(d), _classes()),
    "cross_entropy_loss": lambda d: F.cross_entropy(_x(d), _classes()),
    "div by a number": lambda d: _x(d) / 2,
    "embedding": lambda d: F.embedding(_classes(), _x(d)),
    "embedding_bag": lambda d: F.embedding_bag(_classes().reshape(2, 2), _x(d)),
    "logsumexp": lambda d: torch.logsumexp(_x(d), -1),
    "margin_ranking_loss": lambda d: F.margin_ranking_loss(_x(d, 4), _x(d, 4), _x(d, 4)),
    "multi_margin_loss": lambda d: F.multi_margin_loss(_x(d), _classes()),
    "multilabel_margin_loss": lambda d: F.multilabel_margin_loss(_x(d, 4), _classes()),
    "nll_loss": lambda d: F.nll_loss(_x(d), _classes()),
    "pow of a number": lambda d: 2.0 ** _x(d),
    "renorm": lambda d: torch.renorm(_x(d), 2, 0, 1.0),
    "softplus": lambda d: F.softplus(_x(d)),
    "topk": lambda d: torch.topk(_x(d), 2).values,
    "triplet_margin_loss": lambda d: F.triplet_margin_loss(_x(d), _x(d), _x(d)),
}
PROMOTE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "addcmul": lambda x, y: torch.addcmul(x, y, x),
    "cat": lambda x, y: torch.cat([x, y]),
    "sub": torch.sub,
    "stack": lambda x, y: torch.stack([x, y]),
}
OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": torch.sum,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "abs": torch.abs,
    "mul_": lambda x: x.mul_(x),
    "add.out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
}
NO_GRAD = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@NO_GRAD
@pytest.mark.parametrize("name", LOWER)
def test_the_list_of_lower_precision(name: str, mode: Any) -> None:
    for lower in (torch.bfloat16, torch.float16):
        with mode(), torch.autocast("hpu", dtype=lower):
            assert LOWER[name](torch.float32).dtype is lower
            assert LOWER[name](lower).dtype is lower


@NO_GRAD
@pytest.mark.parametrize("name", FLOAT32)
def test_the_list_of_float32(name: str, mode: Any) -> None:
    with mode(), torch.autocast("hpu", dtype=torch.bfloat16):
        assert FLOAT32[name](torch.bfloat16).dtype is torch.float32
        assert FLOAT32[name](torch.float32).dtype is torch.float32


@NO_GRAD
@pytest.mark.parametrize("name", PROMOTE)
def test_the_list_of_promotion(name: str, mode: Any) -> None:
    low, high = _x(torch.bfloat16), _x(torch.float32)
    with mode(), torch.autocast("hpu", dtype=torch.bfloat16):
        assert PROMOTE[name](low, low).dtype is torch.bfloat16
        assert PROMOTE[name](low, high).dtype is torch.float32
        assert PROMOTE[name](high, high).dtype is torch.float32
        with pytest.raises(RuntimeError, match="prioritize"):
            PROMOTE[name](low, _x(torch.float16))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_on_no_list_keeps_its_dtype(name: str) -> None:
    with torch.autocast("hpu", dtype=torch.bfloat16):
        assert OTHERS[name](_x(torch.float32)).dtype is torch.float32
        assert OTHERS[name](_x(torch.bfloat16)).dtype is torch.bfloat16


def test_what_is_never_cast() -> None:
    with torch.autocast("hpu", dtype=torch.bfloat16):
        assert (_classes() * _classes()).dtype is torch.int64
        assert (torch.ones(2) * torch.ones(2)).dtype is torch.float32  # of the host
        with torch.autocast("hpu", enabled=False):
            assert (_x(torch.float32) * _x(torch.float32)).dtype is torch.float32
