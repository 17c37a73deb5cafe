"""The devices of this machine, and what is said of them."""

import os
from functools import cache

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_hpu_infer import _habana
from lightning_hpu_infer.links import explained


def select_device() -> torch.device:
    """The device of this process: an HPU, real or emulated, if there is one, else the CPU."""
    return torch.device(_habana.DEVICE_TYPE, 0) if _habana.is_available() else torch.device("cpu")


def check_count(devices: int) -> None:
    """Refuse more processes on this machine than it has HPUs. Without an HPU there may be any number.

    Raises:
        MisconfigurationException: If there are too few.
    """
    if not _habana.is_available() or "SLURM_PROCID" in os.environ:  # SLURM may show each task its own device only
        return
    # torchrun has started the processes of this machine already, and `devices` may be those of all machines.
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
    modules = os.environ.get("HABANA_VISIBLE_MODULES")
    # The bridge counts the machine's, and each process takes its own of these modules (bridge 1.19 `device.cpp`,
    # `hccl/__init__.py`).
    found = min(_habana.device_count(), len(modules.split(",")) if modules else wanted)
    if wanted <= found:
        return
    which = f"HABANA_VISIBLE_MODULES={modules}" if modules else "HABANA_VISIBLE_MODULES unset"
    remedy = f"To emulate {wanted}: LIGHTNING_HPU_INFER_EMULATOR={wanted}, or EmulatorConfig(num_devices={wanted})"
    raise MisconfigurationException(
        f"`devices={devices}` needs {wanted} HPUs on this machine, and the bridge finds {found} ({which})."
        f" {remedy if _habana.is_emulated() else 'Ask for fewer'}."
    )


def check_training() -> None:
    """Say what becomes of `trainer.fit` on an HPU: on an emulated one nothing, on a real one what the user makes of it.

    Raises:
        MisconfigurationException: If the HPU is emulated.
    """
    if _habana.is_emulated():
        raise MisconfigurationException(
            "The emulated HPU cannot train: it has no autograd. Fit with `Trainer(accelerator='cpu')`, or before the"
            " emulator is installed, and predict with HPUInferenceAccelerator."
        )
    if _habana.is_lazy():
        rank_zero_warn(
            "HPUInferenceAccelerator is for prediction: in lazy mode nothing marks the steps of `fit`, so that ops pile"
            " up until something reads a value. Train in eager mode (PT_HPU_LAZY_MODE=0), or call"
            " `habana_frameworks.torch.core.mark_step()` after the backward pass and after the optimizer's step."
        )


def log_device(device: torch.device) -> None:
    """Say where predictions are made: once per process and device."""
    if device.type != _habana.DEVICE_TYPE:
        where = f"the {device.type.upper()}"
    else:
        mode = "lazy" if _habana.is_lazy() else "eager"
        where = f"an HPU ({mode} mode)"
        if _habana.is_emulated():
            where = f"an emulated HPU ({mode} mode), whose speed is not a Gaudi's"
    _log(f"HPUInferenceAccelerator: predicting on {where}.")


@cache
def _log(text: str) -> None:
    rank_zero_info(text)


@cache
def warn_of_cpu() -> None:
    """Say what predicts in place of an HPU: once per process."""
    rank_zero_warn(
        "No HPU was found: HPUInferenceAccelerator predicts on the CPU. On a Gaudi machine, install Habana's PyTorch"
        " bridge (`habana_frameworks`). To try the HPU code path on any machine, emulate one: call"
        " `lightning_hpu_infer.emulator.install()` or set LIGHTNING_HPU_INFER_EMULATOR=1."
        + explained("no-hpu-was-found")
    )
