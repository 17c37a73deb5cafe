"""Which ops autocast runs in which precision: the bridge's lists, or the user's.

Everything here follows the bridge's ``hpu_ops/autocast_helpers.h`` and its ``hpu_ops/backend/autocast_helpers.cpp``
(release 1.19).
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload
from torch.overrides import enable_reentrant_dispatch

aten = torch.ops.aten

LOWER_LIST_ENV = "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST"
"""Path of a file that replaces `LOWER`, one op a line; read at `install`."""
FLOAT32_LIST_ENV = "PT_HPU_AUTOCAST_FP32_OPS_LIST"
"""Path of a file that replaces `FLOAT32`."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LOWER = _names(
    "addmm addbmm batch_norm baddbmm bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d dot"
    " dropout feature_dropout group_norm instance_norm layer_norm leaky_relu linear matmul mean mm mul mv softmax"
    " log_softmax scaled_dot_product_attention"
)
"""Their floating-point operands become autocast's dtype."""
FLOAT32 = _names(
    "acos addcdiv asin atan2 bilinear binary_cross_entropy binary_cross_entropy_with_logits cdist cosh"
    " cosine_embedding_loss cosine_similarity cross_entropy_loss dist div divide embedding embedding_bag erfinv exp"
    " expm1 hinge_embedding_loss huber_loss kl_div l1_loss log log10 log1p log2 logsumexp margin_ranking_loss mse_loss"
    " multi_margin_loss multilabel_margin_loss nll_loss pdist poisson_nll_loss pow reciprocal renorm rsqrt sinh"
    " smooth_l1_loss soft_margin_loss softplus tan topk triplet_margin_loss truediv true_divide"
)
"""Their floating-point operands become float32."""
PROMOTE = _names("add addcmul addcdiv cat div exp mul pow sub iadd truediv stack")
"""Their floating-point operands become float32 if one of them is, or else autocast's dtype."""
FIRST_ONLY = frozenset({"layer_norm", "group_norm", "instance_norm", "batch_norm"})
"""Of `LOWER`, those of which only the first operand is cast, and not weights and statistics."""

_KEY = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastHPU"))
_calls = threading.local()
Cast = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def kernels() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield the name of each op that autocast changes, and what it calls instead.

    An op that is in several lists is treated as the first of them says: lower, float32, promote. A name stands for all
    overloads that return new results; in-place and ``out=`` calls are not cast.
    """
    lower, float32 = _load(LOWER_LIST_ENV, LOWER), _load(FLOAT32_LIST_ENV, FLOAT32)
    for name in sorted(lower | float32 | PROMOTE):
        if name in lower:
            cast = _lower_first if name in FIRST_ONLY else _lower
        else:
            cast = _to_float32 if name in float32 else _promote
        for func in _overloads(name):
            yield str(func).removeprefix("aten.").removesuffix(".default"), _kernel(func, cast)


def _load(variable: str, default: frozenset[str]) -> frozenset[str]:
    path = os.environ.get(variable)
    if path is None:
        return default
    try:
        return frozenset(Path(path).read_text().splitlines())
    except OSError as error:
        warnings.warn(f"{variable} is ignored, because its file cannot be read: {error}", stacklevel=2)
        return default


def _overloads(name: str) -> list[OpOverload]:
    """Return the overloads behind a function of C++; a name of Python's, such as ``iadd``, has none."""
    packet = getattr(aten, name, None) if name.isidentifier() and not name.endswith("_") else None
    if packet is None:
        return []
    found = [getattr(packet, overload) for overload in packet.overloads()]
    return [func for func in found if not func._schema.is_mutable and _takes_tensors(func)]


def _takes_tensors(func: OpOverload) -> bool:
    return any("Tensor" in str(argument.type) for argument in func._schema.arguments)


def _kernel(func: OpOverload, cast: Cast) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        outer, _calls.has_cast = _has_cast(), True
        try:
            with torch._C._ExcludeDispatchKeyGuard(_KEY):
                args, kwargs = cast(args, kwargs)
                return func(*args, **kwargs)
        finally:
            _calls.has_cast = outer

    return kernel


def _has_cast() -> bool:
    """Tell whether this thread is in an op whose operands were cast: its parts are left alone."""
    return getattr(_calls, "has_cast", False)


def of_parts() -> contextlib.AbstractContextManager[object]:
    """Return a context in which autocast casts the operands of ops that another one is made of.

    PyTorch takes an op apart before autocast, except in inference mode: there it arrives whole at the tensor, and with
    autocast switched off.
    """
    if _has_cast():
        return contextlib.nullcontext()
    with enable_reentrant_dispatch():
        enabled = torch.is_autocast_enabled("hpu")
    if not enabled:
        return contextlib.nullcontext()
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded - _KEY)


def _is_eligible(value: Any) -> bool:
    # Of the device: an HpuTensor, or a fake one while tracing. A number, which is a tensor of the host, is left alone.
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "hpu"
        and value.is_floating_point()
        and value.dtype is not torch.float64
    )


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, dtype) for item in value)
    return value.to(dtype) if _is_eligible(value) else value


def _all_to(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _to(args, dtype), {name: _to(value, dtype) for name, value in kwargs.items()}


def _lower(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _all_to(args, kwargs, torch.get_autocast_dtype("hpu"))


def _lower_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_to(args[0], torch.get_autocast_dtype("hpu")), *args[1:]), kwargs


def _to_float32(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _all_to(args, kwargs, torch.float32)


def _promote(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lower = torch.get_autocast_dtype("hpu")
    dtypes = set(_dtypes((args, list(kwargs.values()))))
    if others := dtypes - {lower, torch.float32}:
        raise RuntimeError(
            f"Unexpected floating ScalarType in at::autocast::prioritize: {others.pop()} under an autocast to {lower};"
            f" cast it to {lower} or torch.float32"
        )
    return _all_to(args, kwargs, torch.float32 if torch.float32 in dtypes else lower)


def _dtypes(value: Any) -> Iterator[torch.dtype]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _dtypes(item)
    elif _is_eligible(value):
        yield value.dtype
