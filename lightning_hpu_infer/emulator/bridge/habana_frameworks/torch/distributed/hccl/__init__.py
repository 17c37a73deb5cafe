"""Process set-up and the backend "hccl", here on top of gloo."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

__all__ = ["initialize_distributed_hpu"]


def _env_int(names: tuple[str, ...], default: int) -> int:
    for name in names:
        if name in os.environ:
            return int(os.environ[name])
    return default


def initialize_distributed_hpu(
    world_size: int | None = None, rank: int | None = None, local_rank: int | None = None
) -> tuple[int, int, int]:
    """Settle world size, rank and local rank from arguments or environment (bridge: hccl/__init__.py:27-110)."""
    if world_size is not None and rank is not None and local_rank is not None:
        os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(local_rank))
    else:
        world_size = _env_int(("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"), 1)
        rank = _env_int(("RANK", "OMPI_COMM_WORLD_RANK"), -1)
        local_rank = _env_int(("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"), -1)
        if "OMPI_COMM_WORLD_SIZE" in os.environ:
            os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(local_rank))
            os.environ.setdefault("MASTER_ADDR", "localhost")
            os.environ.setdefault("MASTER_PORT", "12345")
    if world_size > 1 and local_rank >= 0:
        visible = os.environ.get("HABANA_VISIBLE_MODULES")
        modules = visible.split(",") if visible else None
        os.environ["HLS_MODULE_ID"] = modules[local_rank] if modules else str(local_rank)
    return world_size, rank, local_rank


def _create(options: Any, backend_options: Any) -> Any:
    return _process_group(options)


def _process_group(options: Any) -> Any:
    from lightning_hpu_infer.emulator.hccl import HcclProcessGroup

    return HcclProcessGroup(options)


def _register() -> None:
    if dist.is_available() and "hccl" not in dist.Backend.backend_list:
        dist.Backend.register_backend("hccl", _create, extended_api=True, devices="hpu")


def _unregister() -> None:
    # PyTorch has no function for it.
    if dist.is_available() and "hccl" in dist.Backend.backend_list:
        dist.Backend.backend_list.remove("hccl")
        for table in ("backend_capability", "_plugins", "backend_type_map"):
            getattr(dist.Backend, table, {}).pop("HCCL" if table == "_plugins" else "hccl", None)
        dist.Backend.default_device_backend_map.pop("hpu", None)
        if hasattr(dist.Backend, "HCCL"):
            del dist.Backend.HCCL


initialize_distributed_hpu()
_register()
