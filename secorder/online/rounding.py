"""How much of a difference the audit accepts as rounding."""

from math import sqrt

import torch
from torch import Tensor

from .._torch.float32 import Operation, rounding_of_products
from ..layers.patches import Patches
from ..layers.per_sample import Outer, PerSample

__all__ = ["UNITS", "added", "operations_of", "tolerance_of"]

#: In units in the last place of the products' size: of the parameter's dtype, and of a lower one that factors are
#: rounded to before they are multiplied; and of sums of random terms, times the root of their number.
UNITS = 64
UNITS_OF_FACTORS = 8
UNITS_OF_WALKS = 3


def added(terms: float) -> float:
    """What the square of a size is multiplied by, where so many terms may be added to a sum one after the other.

    Where they are alike, as behind an average over positions, this rounds by an eighth of their number, in units in the
    last place: so measured of the gradients of biases of convolutions, of layer norms, and of rows of a table, on CPUs.
    """
    return max(1.0, terms / (4 * UNITS)) ** 2


def tolerance_of(
    value: Tensor, dtype: torch.dtype, low: torch.dtype | None, operations: tuple[Operation, ...], terms: int
) -> float:
    """What part of a number's size may be rounding.

    Args:
        value: the number.
        dtype: of the parameter.
        low: what factors are rounded to.
        operations: what the whole gradient may have been made by.
        terms: of a product with random numbers, which adds up like a random walk: each rounds by what came before.
    """
    factors = 0.0 if low is None else torch.finfo(low).eps
    if dtype is torch.float32:
        factors = max(factors, *(2 * rounding_of_products(value.device, x) for x in operations))
    units = max(UNITS, UNITS_OF_WALKS * sqrt(terms))
    return max(units * torch.finfo(dtype).eps, UNITS_OF_FACTORS * factors)


def operations_of(gradient: PerSample) -> tuple[Operation, ...]:
    """What the whole gradient may have been made by."""
    if isinstance(gradient, Outer):
        return ("convolution",) if isinstance(gradient.a, Patches) else ("product",)
    return "product", "convolution", "recurrence"
