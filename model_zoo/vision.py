"""Access to timm, which imports torchvision, whose wheel lacks its compiled ops beside a CPU build of torch.

Both are installed in a folder of their own (see the Makefile), because torchmetrics, and with it Lightning, would
import such a torchvision wherever it is found, and fail.
"""

import sys
from pathlib import Path
from types import ModuleType

import torch

_FOLDER = Path(sys.prefix) / "vision"
_OPS = torch.library.Library("torchvision", "FRAGMENT")


def import_timm() -> ModuleType:
    """Import timm, with the compiled ops declared that torchvision's Python code registers kernels for."""
    if _FOLDER.is_dir() and str(_FOLDER) not in sys.path:
        sys.path.append(str(_FOLDER))
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _OPS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm
