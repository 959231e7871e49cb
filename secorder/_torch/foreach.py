"""Norms of many tensors in few operations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["norms"]


def norms(tensors: Sequence[Tensor]) -> list[float]:
    """The Euclidean norm of each tensor, in one transfer to the host.

    Half precision is summed in float32. Of a ``DTensor`` it is the norm of the whole, and every rank must call this.

    Args:
        tensors: of any shapes, floating-point dtypes and devices.
    """
    if not tensors:
        return []
    alike: dict[tuple[torch.device, bool, bool], list[int]] = {}
    for place, tensor in enumerate(tensors):
        double = tensor.dtype == torch.float64
        alike.setdefault((tensor.device, double, hasattr(tensor, "full_tensor")), []).append(place)
    found: list[Tensor] = [torch.empty(())] * len(tensors)
    with torch.no_grad():
        for (_, double, sharded), places in alike.items():
            dtype = torch.float64 if double else torch.float32
            group = [tensors[place].detach() for place in places]
            values: Sequence[Any]
            if sharded:
                each: list[Any] = [torch.linalg.vector_norm(t, dtype=dtype) for t in group]
                values = [norm.full_tensor() for norm in each]
            else:
                values = torch._foreach_norm(group, 2, dtype=dtype)
            for place, value in zip(places, values, strict=True):
                found[place] = value
        device = found[0].device
        numbers: list[float] = torch.stack([value.to(device, torch.float64) for value in found]).tolist()
    return numbers
