"""``torch.distributed``: whether there are other ranks, and collective operations on tensors of any device."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def has_ranks() -> bool:
    """Whether this process is one of the ranks of a process group."""
    return dist.is_available() and dist.is_initialized()


def all_reduce(tensor: Tensor, *, op: "dist.ReduceOp.RedOpType | None" = None, group: Any = None) -> None:
    """As ``torch.distributed.all_reduce``, in place, for a tensor on any device; the sum if no ``op`` is given.

    NCCL knows nothing of the host's memory, where sums may be kept: they make the way over the group's device.
    """
    op = dist.ReduceOp.SUM if op is None else op
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if tensor.device.type in kinds:
        dist.all_reduce(tensor, op=op, group=group)
        return
    moved = tensor.to(kinds[0])
    dist.all_reduce(moved, op=op, group=group)
    tensor.copy_(moved)
