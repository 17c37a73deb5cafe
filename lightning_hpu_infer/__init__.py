"""Fast `trainer.predict` on Intel Gaudi (HPU) for PyTorch Lightning."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from lightning_hpu_infer import accelerator as _accelerator
from lightning_hpu_infer import strategies as _strategies
from lightning_hpu_infer.accelerator import HPUInferenceAccelerator
from lightning_hpu_infer.config import InferenceConfig
from lightning_hpu_infer.lengths.pad import Pad, PadSpec
from lightning_hpu_infer.pipeline import InferencePipeline
from lightning_hpu_infer.strategies import HPUInferenceDDPStrategy, HPUInferenceStrategy
from lightning_hpu_infer.streaming import stream
from lightning_hpu_infer.writing import check_pyarrow
from lightning_hpu_infer.writing.callback import PredictionWriter

__version__ = "0.1.0"

__all__ = [
    "HPUInferenceAccelerator",
    "HPUInferenceDDPStrategy",
    "HPUInferenceStrategy",
    "InferenceConfig",
    "InferencePipeline",
    "Pad",
    "PadSpec",
    "PredictionWriter",
    "__version__",
    "iter_predictions",
    "read_predictions",
    "stream",
]

if TYPE_CHECKING:
    from lightning_hpu_infer.writing.read import iter_predictions, read_predictions
else:
    # What needs pyarrow, which is optional, is imported when it is asked for.
    _WRITING = {"iter_predictions": "writing.read", "read_predictions": "writing.read"}

    def __getattr__(name):
        if name in _WRITING:
            check_pyarrow()
            return getattr(import_module(f"{__name__}.{_WRITING[name]}"), name)
        return object.__getattribute__(sys.modules[__name__], name)


_accelerator.register()
_strategies.register()

if (_devices := os.environ.get("LIGHTNING_HPU_INFER_EMULATOR", "0")) not in ("", "0"):
    from lightning_hpu_infer import emulator as _emulator

    # The value is the number of devices; any other word means one.
    _lazy = os.environ.get("PT_HPU_LAZY_MODE", "1") != "0"
    _emulator.install(_emulator.EmulatorConfig(lazy=_lazy, num_devices=int(_devices) if _devices.isdecimal() else 1))
