"""How much of a difference the audit accepts as rounding."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from ..._torch.float32 import Operation, rounding_of_products
from ...layers.patches import Patches
from ...layers.per_sample import Outer, PerSample

#: In units in the last place of the products' size: of the parameter's dtype, and of a lower one that factors are
#: rounded to before they are multiplied; and of sums of random terms, times the root of their number.
UNITS = 64
UNITS_OF_FACTORS = 8
UNITS_OF_WALKS = 3

#: Rows up to which the norm of a factor is taken whole, since few may happen to be orthogonal to r or s; of more, the
#: rows, or samples of several rows each, that are looked at beside their products with r or s.
FEW, FEW_SAMPLES = 32, 4


def added(terms: float) -> float:
    """What the square of a size is multiplied by, where so many terms may be added to a sum one after the other.

    Where they are alike, as behind an average over positions, this rounds by an eighth of their number, in units in the
    last place: so measured of the gradients of biases of convolutions, of layer norms, and of rows of a table, on CPUs.
    """
    return max(1.0, terms / (4 * UNITS)) ** 2


def before_sums(cotangents: Sequence[Tensor], part: Tensor) -> Tensor | None:
    """The square of the size of cotangents that dense per-sample gradients are sums of; None where they are none.

    A normalisation that follows another takes off all that its parameters do: of their gradients rounding is left.
    """
    if sum([g.numel() for g in cotangents]) <= part.numel():
        return None
    some = [g[:: max(1, len(g) // FEW_SAMPLES)] for g in cotangents]
    squares = [torch.linalg.vector_norm(x, dtype=part.dtype).square() for x in some]
    return sum(
        [own * (len(g) / len(x)) for own, g, x in zip(squares, cotangents, some, strict=True)], part.new_zeros(())
    )


def size_of(whole: Tensor, product: Tensor) -> Tensor:
    """The square of a factor's norm; where it has rows enough, by their product with random numbers and by some rows.

    Rows that are nearly alike, as tokens in a deep transformer are, may all happen to be orthogonal to what was drawn;
    and a few rows alone do not tell of one that is much larger than the others.
    """
    if product.shape[0] <= FEW:
        flat = whole.to(product.dtype).flatten()
        return torch.dot(flat, flat)
    rows = whole.shape[0]
    some = whole[:: max(1, rows // (FEW if whole.dim() == 2 else FEW_SAMPLES))]
    flat = some.to(product.dtype).flatten()
    return torch.dot(product, product).add_(torch.dot(flat, flat), alpha=rows / some.shape[0])


def tolerance_of(
    value: Tensor, dtype: torch.dtype, low: torch.dtype | None, operations: tuple[Operation, ...], terms: int
) -> float:
    """What part of a number's size may be rounding, also of factors to a ``low`` dtype, and by what operations may do.

    A product of so many terms with random numbers adds up like a random walk: each rounds by what came before.
    """
    factors = 0.0 if low is None else torch.finfo(low).eps
    for operation in operations if dtype is torch.float32 else ():
        factors = max(factors, 2 * rounding_of_products(value.device, operation))
    units = max(UNITS, UNITS_OF_WALKS * sqrt(terms))
    return max(units * torch.finfo(dtype).eps, UNITS_OF_FACTORS * factors)


def operations_of(gradient: PerSample) -> tuple[Operation, ...]:
    """What the whole gradient may have been made by."""
    if isinstance(gradient, Outer):
        return ("convolution",) if isinstance(gradient.a, Patches) else ("product",)
    return "product", "convolution", "recurrence"
