"""The process group behind the backend "hccl": gloo on host copies of the device tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class HcclProcessGroup(dist.ProcessGroup):
    """Collectives that prediction needs: broadcast, all-reduce, all-gather, barrier. All of them block."""

    def __init__(self, options: Any) -> None:
        super().__init__(options.group_rank, options.group_size)  # type: ignore[call-arg]
        gloo: Any = dist.ProcessGroupGloo
        self._gloo = gloo(options.store, options.group_rank, options.group_size, options.timeout)

    def getBackendName(self) -> str:
        """Return "hccl"."""
        return "hccl"

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any) -> Any:  # type: ignore[override]
        """Send the tensors of one rank to all."""
        return self._through_host(lambda host: self._gloo.broadcast(host, opts), tensors)

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        """Reduce over all ranks."""
        opts = opts if opts is not None else dist.AllreduceOptions()
        return self._through_host(lambda host: self._gloo.allreduce(host, opts), tensors)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """Collect one tensor of every rank."""
        opts = opts if opts is not None else torch._C._distributed_c10d.AllgatherOptions()
        host = [[torch.empty(t.shape, dtype=t.dtype) for t in group] for group in outputs]
        work = self._gloo.allgather(host, [t.detach().cpu() for t in inputs], opts)
        work.wait()
        for group, received in zip(outputs, host, strict=True):
            for tensor, value in zip(group, received, strict=True):
                tensor.copy_(value)
        return work

    def barrier(self, opts: Any = None) -> Any:
        """Wait for all ranks."""
        return self._gloo.barrier(opts if opts is not None else dist.BarrierOptions())

    def _through_host(self, collective: Any, tensors: Sequence[torch.Tensor]) -> Any:
        host = [tensor.detach().cpu() for tensor in tensors]
        work = collective(host)
        work.wait()
        for tensor, value in zip(tensors, host, strict=True):
            tensor.copy_(value)
        return work
