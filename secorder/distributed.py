"""Reductions over the ranks of a process group: everything in one bucket a dtype, by ``torch.distributed``."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .diagonals import Diagonals
from .errors import ProbeStateError

__all__ = ["add_up", "weighted_mean"]


def add_up(tensors: Sequence[Tensor], group: "dist.ProcessGroup | None" = None) -> None:
    """Replace each tensor by its sum over the ranks, in place, with one collective for each dtype and device.

    Args:
        tensors: the same shapes on every rank.
        group: a process group; the default group if None.

    Raises:
        ProbeStateError: ``torch.distributed`` is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ProbeStateError("torch.distributed is not initialised: call torch.distributed.init_process_group first.")
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        buckets.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for bucket in buckets.values():
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def weighted_mean(diagonals: Diagonals, weight: float, group: "dist.ProcessGroup | None" = None) -> Diagonals:
    """``Σ_r w_r D_r / Σ_r w_r`` over the ranks: the diagonal of the whole batch from those of its parts.

    Args:
        diagonals: of this rank's part of the batch.
        weight: its number of samples, for a Fisher and for the Hessian of a mean loss.
        group: a process group; the default group if None.

    Returns:
        the same on every rank; standard errors are combined as those of independent estimates.

    Raises:
        ProbeStateError: ``torch.distributed`` is not initialised.
    """
    total = torch.tensor(weight, dtype=torch.float64)
    values = {name: weight * d for name, d in diagonals.items()}
    errors = {name: (weight * e) ** 2 for name, e in (diagonals.standard_error or {}).items()}
    add_up([total, *values.values(), *errors.values()], group)
    whole = total.item()
    return diagonals.replaced(
        {name: d / whole for name, d in values.items()},
        {name: e.sqrt() / whole for name, e in errors.items()} if diagonals.standard_error is not None else None,
    )
