"""In which dtype curvature is computed, and what passes for rounding in it."""

import torch
from torch import Tensor

from .._torch.fsdp import local
from .selection import Layer

#: Sums of so many terms round by a few units in the last place of what the terms' squares add up to, whatever they are.
MANY_TERMS = 256

#: What passes for rounding at most, relative to the largest entry.
MOST_ROUNDING = 1 / 16


def compute_dtype(layer: Layer) -> torch.dtype:
    """The dtype a layer's curvature is accumulated in: float32 for half precision, else the parameters' own."""
    dtype = torch.float32
    for parameter in layer.parameters.values():
        if parameter.dtype is not dtype:
            dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype`` if it holds real numbers, as it is if it holds indices."""
    return tensor if tensor.dtype is dtype or not tensor.is_floating_point() else tensor.to(dtype)


def rounding(dtype: torch.dtype) -> float:
    """What passes for rounding, relative to the largest entry: a thousand units in the last place, or 1/16."""
    return min(1024 * torch.finfo(dtype).eps, MOST_ROUNDING)


def zeros(layer: Layer) -> list[Tensor]:
    """A zero diagonal, by parameter; of a sharded one this rank's part."""
    dtype = compute_dtype(layer)
    parts = [local(p) for p in layer.parameters.values()] if layer.spread is not None else layer.parameters.values()
    return [torch.zeros(part.numel(), dtype=dtype, device=part.device) for part in parts]


def added_up(products: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """Sums of many terms, and what the square of their size is multiplied by to be that of what may be rounding.

    Random terms add up like a random walk. N that are equal round by up to N/8 units in the last place of the sum, and
    several such sums, with random factors, by several times that: a 64th of N, of 64 units. In between, they are alike
    as far as (Σ p)² is N Σ p², by Cauchy and Schwarz.
    """
    total, terms = products.sum(dim), products.shape[dim]
    if terms <= MANY_TERMS:
        return total, torch.ones_like(total)
    most = terms * products.square().sum(dim)
    alike = total.square() / most.clamp(min=torch.finfo(most.dtype).tiny)
    return total, 1 + alike * (terms / 64) ** 2
