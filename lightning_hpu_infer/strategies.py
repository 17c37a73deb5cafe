"""Strategies for one and for several devices, and how `strategy="auto"` comes to mean them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry

from lightning_hpu_infer import _habana, _lightning
from lightning_hpu_infer.accelerator import HPUInferenceAccelerator
from lightning_hpu_infer.devices import select_device


class HostCheckpointIO(TorchCheckpointIO):
    """Saves tensors as host tensors, so that a checkpoint loads with or without an HPU."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Copy the tensors of a checkpoint to the host and save it."""
        super().save_checkpoint(move_data_to_device(checkpoint, torch.device("cpu")), path, storage_options)


class _ForInference(Strategy):
    """What our strategies share: their accelerator, and checkpoints of host tensors."""

    strategy_name: str

    def __init__(self, **kwargs: Any) -> None:
        kwargs["checkpoint_io"] = kwargs.get("checkpoint_io") or HostCheckpointIO()
        super().__init__(**kwargs)

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


class HPUInferenceStrategy(_ForInference, SingleDeviceStrategy):
    """One device. `strategy="auto"` means this for one device.

    Args:
        device: An HPU if there is one, else the CPU.
        **kwargs: Passed to `SingleDeviceStrategy`.
    """

    strategy_name = "hpu_infer"

    def __init__(self, device: torch.device | str | None = None, **kwargs: Any) -> None:
        super().__init__(device=select_device() if device is None else device, **kwargs)


class HPUInferenceDDPStrategy(_ForInference, DDPStrategy):
    """One process per device; each predicts its share of the samples. `strategy="auto"` means this for several.

    Args:
        **kwargs: Passed to `DDPStrategy`.
    """

    strategy_name = "hpu_infer_ddp"

    def setup_environment(self) -> None:
        """Register `hccl` before the process group is made.

        Until then torch's default for `hpu` is its *fake* backend, whose collectives do nothing at all.
        """
        if self.root_device.type == _habana.DEVICE_TYPE:
            assert self.cluster_environment is not None
            self.set_world_ranks()
            _habana.initialize_distributed(self.world_size, self.global_rank, self.local_rank)
        super().setup_environment()

    def setup_distributed(self) -> None:
        """Make the process group, as `DDPStrategy` does, but without binding it to a device id.

        torch accepts only ids of the device that it takes for the current accelerator, which an HPU need not be.

        Raises:
            RuntimeError: If the backend is torch's fake one.
        """
        reset_seed()
        self.set_world_ranks()
        self._process_group_backend = self._get_process_group_backend()
        if self._process_group_backend == "fake":
            raise RuntimeError(
                f"The process group backend for {self.root_device} is torch's 'fake', which exchanges nothing. Install"
                " Habana's bridge with its `hccl` backend, or pass `process_group_backend` to the strategy."
            )
        assert self.cluster_environment is not None
        _lightning.init_dist_connection(self.cluster_environment, self._process_group_backend, timeout=self._timeout)

    def _get_process_group_backend(self) -> str:
        # Lightning 2.4 knows nccl and gloo only.
        on_hpu = self.root_device.type == _habana.DEVICE_TYPE
        return self._process_group_backend or ("hccl" if on_hpu else "gloo")

    def on_predict_end(self) -> None:
        """Let all ranks end together.

        Prediction needs no exchange, so a rank could end well, and with it the command, while another one fails.
        """
        super().on_predict_end()
        self.barrier("predict_end")

    def determine_ddp_device_ids(self) -> None:
        """One device per process, so DDP needs no id."""
        return


def register() -> None:
    """Make the strategies known to Lightning, by name and as what `strategy="auto"` means. Idempotent."""
    for strategy, description in (
        (HPUInferenceStrategy, "One Intel Gaudi device"),
        (HPUInferenceDDPStrategy, "Several Intel Gaudi devices, a process each"),
    ):
        if strategy.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(strategy.strategy_name, strategy, description=description)
    _lightning.choose_strategy(_choose)
    _lightning.pair_strategy(_pair)


def _choose(connector: Any, stock: Callable[[Any], Any]) -> Strategy | str:
    """What `strategy="auto"` means: ours for our accelerator, Lightning's choice for any other.

    Lightning gives every accelerator that it does not know `SingleDeviceStrategy("cpu")` or plain "ddp", and asks
    nobody (2.6 `accelerator_connector.py`, `_choose_strategy`).
    """
    if not isinstance(connector.accelerator, HPUInferenceAccelerator):
        choice: Strategy | str = stock(connector)
        return choice
    if _lightning.wants_several_processes(connector):
        return HPUInferenceDDPStrategy.strategy_name
    return HPUInferenceStrategy()


def _pair(connector: Any, stock: Callable[[Any], Any]) -> None:
    """Make other DDP strategies work with our accelerator on HPUs, or refuse them.

    lightning-habana's bring up `hccl` themselves, but Lightning 2.5.5 binds their process group to a device id (see
    `HPUInferenceDDPStrategy.setup_distributed`). Others never bring it up.
    """
    stock(connector)
    strategy = connector.strategy
    foreign = isinstance(strategy, DDPStrategy) and not isinstance(strategy, HPUInferenceDDPStrategy)
    if not (foreign and isinstance(connector.accelerator, HPUInferenceAccelerator)):
        return
    if strategy.root_device.type != _habana.DEVICE_TYPE:
        return
    if strategy.process_group_backend is None:
        raise MisconfigurationException(
            f"{type(strategy).__name__} does not set up the backend `hccl`. With HPUInferenceAccelerator pass"
            f" `strategy='auto'` or `strategy={HPUInferenceDDPStrategy.strategy_name!r}`."
        )
    strategy.setup_distributed = functools.partial(HPUInferenceDDPStrategy.setup_distributed, strategy)
