"""Recompilation tools; the names exist, the tools do not."""

from typing import Any


def _unsupported(name: str) -> Any:
    def tool(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{name} is not emulated; watch emulator.stats().compiles or"
            " metric_global('graph_compilation') for recompilations"
        )

    return tool


detect_recompilation_auto_model = _unsupported("detect_recompilation_auto_model")
data_dynamicity = _unsupported("data_dynamicity")
const_shape_dataloader = _unsupported("const_shape_dataloader")
