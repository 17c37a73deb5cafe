"""``hpu_backend``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends import registry

from habana_frameworks.torch.dynamo.compile_backend import config
from lightning_hpu_infer.emulator.compiled import CompiledGraph

_NAME = "hpu_backend"


def hpu_backend(
    graph_module: torch.fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any
) -> Callable[..., Sequence[Any]]:
    """Compile a graph of dynamo's; `options` are names of `config`, a `mode` is accepted."""
    with config.patch(kwargs.get("options")):
        return CompiledGraph(graph_module).__call__


registry.register_backend(hpu_backend, name=_NAME)


def _unregister() -> None:
    registry._COMPILER_FNS.pop(_NAME, None)
    registry._BACKENDS.pop(_NAME, None)
