"""``torch.distributed``: whether there are other ranks, and collective operations on tensors of any device."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..errors import ProbeStateError


def has_ranks() -> bool:
    """Whether this process is one of the ranks of a process group."""
    return dist.is_available() and dist.is_initialized()


def require_ranks() -> None:
    """Raise where there is no process group, or none any more."""
    if not has_ranks():
        raise ProbeStateError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group first, and read what is "
            "sharded before destroy_process_group."
        )


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
