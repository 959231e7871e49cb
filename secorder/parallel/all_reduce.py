"""Reductions over the ranks of a process group: everything in one bucket a dtype, by ``torch.distributed``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch.collectives import all_reduce, require_ranks
from ..errors import ProbeStateError

__all__ = ["add_up"]


def add_up(tensors: Sequence[Tensor], group: "dist.ProcessGroup | None" = None) -> None:
    """Replace each tensor by its sum over the ranks, in place, with one collective for each dtype and device.

    Args:
        tensors: of any shapes, dtypes and devices; each rank's in one order.
        group: a process group; the default group if None.

    Raises:
        ProbeStateError: ``torch.distributed`` is not initialised.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from secorder.parallel.all_reduce import add_up
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # one process, alone
        >>> tensors = [torch.ones(2), torch.zeros((), dtype=torch.int64)]
        >>> add_up(tensors)
        >>> tensors
        [tensor([1., 1.]), tensor(0)]
        >>> dist.destroy_process_group()
    """
    require_ranks()
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for bucket in buckets.values():
        flat = torch.cat([t.reshape(-1) for t in bucket])
        all_reduce(flat, group=group)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def largest(tensor: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """The largest of each element on any rank, of tensors of one shape."""
    require_ranks()
    found = tensor.clone()
    all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found


@contextmanager
def raised_on_all(group: "dist.ProcessGroup | None" = None) -> Iterator[None]:
    """What raises inside on one rank raises on all of them, so that none waits for a sum that never comes.

    Each rank must enter it. Where nothing is raised, one number is reduced.
    """
    require_ranks()
    failed = torch.zeros((), dtype=torch.long, device="cpu")  # or the number of the rank, from 1 on
    try:
        yield
    except Exception:
        all_reduce(failed.fill_(1 + dist.get_rank()), op=dist.ReduceOp.MAX, group=group)
        raise
    all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if int(failed):
        raise ProbeStateError(
            f"measuring this rank's part went well, but rank {int(failed) - 1} raised an error, which says why: there "
            "is no mean over all ranks."
        )
