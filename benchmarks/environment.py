"""What figures were measured with."""

import os
import platform
import time
from typing import Any

import lightning
import torch


def about(*, emulated: bool) -> dict[str, Any]:
    """Date, versions and machine, to stand beside the figures in a file."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": "emulated HPU (figures are not a Gaudi's)" if emulated else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
    }
