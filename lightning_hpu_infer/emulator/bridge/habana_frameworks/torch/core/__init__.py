"""``htcore``: step markers and inference set-up."""

import habana_frameworks.torch.hpu as hpu
from habana_frameworks.torch.core import quantization
from habana_frameworks.torch.core.quantization import (
    hpu_inference_initialize,
    hpu_initialize,
    hpu_reset_env,
    hpu_set_env,
    hpu_set_inference_env,
    hpu_teardown_inference_env,
)
from habana_frameworks.torch.core.step_closure import add_step_closure, iter_mark_step, mark_step
from habana_frameworks.torch.utils.internal import is_lazy

if not is_lazy():  # in lazy mode there is no backend for torch.compile (bridge: core/__init__.py)
    import habana_frameworks.torch.dynamo.compile_backend  # noqa: F401

__all__ = [
    "add_step_closure",
    "hpu",
    "hpu_inference_initialize",
    "hpu_initialize",
    "hpu_reset_env",
    "hpu_set_env",
    "hpu_set_inference_env",
    "hpu_teardown_inference_env",
    "is_lazy",
    "iter_mark_step",
    "mark_step",
    "quantization",
]
