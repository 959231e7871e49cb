"""Reductions over the ranks of a process group: everything in one bucket a dtype, by ``torch.distributed``."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ProbeStateError

__all__ = ["add_up", "all_reduce", "largest"]


def all_reduce(tensor: Tensor, *, op: "dist.ReduceOp.RedOpType | None" = None, group: Any = None) -> None:
    """As ``torch.distributed.all_reduce``, in place, for a tensor on any device.

    NCCL knows nothing of the host's memory, where sums may be kept: they make the way over the group's device.

    Args:
        tensor: of the same shape on every rank.
        op: the sum if None.
        group: a process group; the default group if None.
    """
    op = dist.ReduceOp.SUM if op is None else op
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    if tensor.device.type in kinds:
        dist.all_reduce(tensor, op=op, group=group)
        return
    moved = tensor.to(kinds[0])
    dist.all_reduce(moved, op=op, group=group)
    tensor.copy_(moved)


def add_up(tensors: Sequence[Tensor], group: "dist.ProcessGroup | None" = None) -> None:
    """Replace each tensor by its sum over the ranks, in place, with one collective for each dtype and device.

    Args:
        tensors: the same shapes on every rank.
        group: a process group; the default group if None.

    Raises:
        ProbeStateError: ``torch.distributed`` is not initialised.
    """
    _require_initialised()
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for bucket in buckets.values():
        flat = torch.cat([t.reshape(-1) for t in bucket])
        all_reduce(flat, group=group)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def largest(tensor: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """The largest of each element on any rank.

    Args:
        tensor: of the same shape on every rank.
        group: a process group; the default group if None.

    Raises:
        ProbeStateError: ``torch.distributed`` is not initialised.
    """
    _require_initialised()
    found = tensor.clone()
    all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found


def _require_initialised() -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise ProbeStateError("torch.distributed is not initialised: call torch.distributed.init_process_group first.")
