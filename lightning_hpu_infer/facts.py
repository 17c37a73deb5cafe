"""What is installed on this machine, as far as `trainer.predict` on an HPU is concerned."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.utils import collect_env

from lightning_hpu_infer import _habana, recipes
from lightning_hpu_infer.recipes import FolderState

_PREFIXES = ("PT_HPU_", "PT_HPUGRAPH_", "PT_COMPILE_ONLY_MODE", "HABANA_", "LIGHTNING_HPU_INFER_")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is installed here. Versions are None where a package is not."""

    python: str
    torch: str
    lightning: str | None
    lightning_habana: str | None = None
    bridge: str | None = None
    """Version of `habana_frameworks`; "unknown" if it does not say."""
    emulated: bool = False
    """The bridge is the emulator's."""
    error: str = ""
    """What the bridge raised when it was asked for devices."""
    device_count: int = 0
    device_name: str = ""
    lazy: bool | None = None
    """The bridge's mode, if there is a bridge that works."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of Habana's and ours."""
    recipe_folder: FolderState = FolderState.UNKNOWN
    """What the bridge can do with the folder for compiled recipes that the environment names."""
    system: tuple[str, ...] = ()
    """What `torch.utils.collect_env` says, line by line, for a bug report."""


def gather_facts() -> Facts:
    """Look at this process. Asks the bridge for its devices, which may open one."""
    bridge = _bridge_version() if _habana.is_installed() else None
    count, name, lazy, error = 0, "", None, ""
    emulated = False
    if bridge is not None:
        try:
            emulated = _habana.is_emulated()
            if _habana.is_available():
                count, name = _habana.device_count(), _device_name()
            lazy = _habana.is_lazy()
        except Exception as problem:  # whatever a half-installed bridge raises is a finding
            error = f"{type(problem).__name__}: {problem}".strip().splitlines()[0]
    return Facts(
        python="{}.{}.{}".format(*sys.version_info),
        torch=torch.__version__,
        lightning=_version("lightning"),
        lightning_habana=_version("lightning-habana"),
        bridge=bridge,
        emulated=emulated,
        error=error,
        device_count=count,
        device_name=name,
        lazy=lazy,
        environment={name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)},
        recipe_folder=_recipe_folder(),
        system=_system(),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _bridge_version() -> str:
    return _version("habana-torch-plugin") or "unknown"


def _device_name() -> str:
    try:
        return str(torch.get_device_module(_habana.DEVICE_TYPE).get_device_name())
    except (AttributeError, RuntimeError):
        return ""


def _recipe_folder() -> FolderState:
    try:
        folder = recipes.parse(os.environ.get(recipes.VARIABLE, "")).folder
    except ValueError:
        folder = ""
    return recipes.folder_state(folder) if folder else FolderState.UNKNOWN


def _system() -> tuple[str, ...]:
    try:
        return tuple(str(collect_env.get_pretty_env_info()).splitlines())  # type: ignore[no-untyped-call]
    except Exception as problem:  # it runs a dozen programs of the system
        return (f"torch.utils.collect_env failed: {type(problem).__name__}: {problem}",)
