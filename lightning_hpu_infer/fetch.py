"""Outputs on their way back to the host."""

from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_hpu_infer import _habana

_HOST = torch.device("cpu")


class PendingOutput:
    """What a step returned, while the device may still be computing it.

    The copy to the host is blocking and late by design: a blocking copy waits for its own producer only, so a later
    batch that was launched already keeps the device busy meanwhile, whereas a non-blocking copy to the host may be
    read too early (bridge `device.cpp`, and Lightning's issue #11287: zeros in written predictions).

    Args:
        output: Any collection, tensors of it on any device. It must own its tensors: nothing may overwrite them.
        device: Where the step was launched.
        fetch: Whether anybody wants the output on the host.
    """

    def __init__(self, output: Any, device: torch.device, *, fetch: bool = True) -> None:
        self.output = output
        self._fetch = fetch
        # Without a copy that waits, only an event bounds how far the host can run ahead of the device.
        waits = fetch and any(
            isinstance(leaf, Tensor) and leaf.device.type == device.type for leaf in tree_leaves(output)
        )
        self._event = None if waits or device.type != _habana.DEVICE_TYPE else _habana.record_event()

    def result(self) -> Any:
        """Wait until the output is there and return it with host tensors; unmoved if `fetch` was False."""
        if self._event is not None:
            self._event.synchronize()
        return move_data_to_device(self.output, _HOST) if self._fetch else self.output


def _on_device(output: Any, device: torch.device) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.device.type == device.type for leaf in tree_leaves(output))
