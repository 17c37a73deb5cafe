"""Strategies by name. With `strategy="auto"` the accelerator needs none of them."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_hpu_infer.accelerator import HPUInferenceAccelerator, select_device


class HPUInferenceStrategy(SingleDeviceStrategy):
    """One device, known from the Trainer's construction on.

    The difference to `strategy="auto"`: the LightningModule's `setup` and `configure_model` hooks see the HPU as
    `self.device` in the first run already.

    Args:
        device: An HPU if there is one, else the CPU.
        **kwargs: Passed to `SingleDeviceStrategy`.
    """

    strategy_name = "hpu_infer"

    def __init__(self, device: torch.device | str | None = None, **kwargs: Any) -> None:
        super().__init__(select_device() if device is None else device, **kwargs)

    @property
    def accelerator(self) -> Accelerator | None:
        """The accelerator that the Trainer paired this strategy with."""
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        if accelerator is not None and not isinstance(accelerator, HPUInferenceAccelerator):
            raise MisconfigurationException(
                f"`strategy={self.strategy_name!r}` needs `accelerator=HPUInferenceAccelerator(...)` or"
                f" `accelerator='hpu_infer'`, got {type(accelerator).__name__}."
            )
        self._accelerator = accelerator


def register() -> None:
    """Make the strategies known to Lightning by name. Does nothing the second time."""
    if HPUInferenceStrategy.strategy_name not in StrategyRegistry:
        StrategyRegistry.register(
            HPUInferenceStrategy.strategy_name, HPUInferenceStrategy, description="One Intel Gaudi device"
        )
