"""Operations on many tensors at once: a thousand small ones take one call, and on an accelerator few kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_each", "add_products", "divide_each", "multiply_each", "set_to_zero", "square_each"]


def add_each(totals: Sequence[Tensor], parts: Sequence[Tensor], *, alpha: float = 1.0) -> None:
    """Add to each tensor another one of its shape, in place.

    Args:
        totals: at least one.
        parts: as many; each of the dtype and on the device of its total.
        alpha: that the parts are multiplied by.
    """
    torch._foreach_add_(list(totals), list(parts), alpha=alpha)


def add_products(
    totals: Sequence[Tensor], parts: Sequence[Tensor], factors: Sequence[Tensor], *, alpha: float = 1.0
) -> None:
    """Add to each tensor the product of two others, in place: another one of its shape, and a number or a bool.

    Args:
        totals: at least one.
        parts, factors: as many.
        alpha: that all are multiplied by.
    """
    # alpha times a part might be infinite, and that times zero no number
    torch._foreach_addcmul_(list(totals), list(factors), list(parts), value=alpha)


def multiply_each(tensors: Sequence[Tensor], factors: Sequence[Tensor] | float) -> None:
    """Multiply each tensor by a number or a bool, in place: by one for all, or each by its own on the same device.

    Args:
        tensors: at least one.
        factors: one, or as many.
    """
    torch._foreach_mul_(list(tensors), factors if isinstance(factors, float) else list(factors))


def set_to_zero(tensors: Sequence[Tensor]) -> None:
    """Set all elements of each tensor to zero, in place.

    Args:
        tensors: at least one.
    """
    torch._foreach_zero_(list(tensors))


def square_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The squares of each tensor's elements.

    Args:
        tensors: at least one.
    """
    return list(torch._foreach_mul(list(tensors), list(tensors)))


def divide_each(tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Divide each tensor by a number of its own, in place.

    Args:
        tensors: at least one.
        numbers: as many.
    """
    torch._foreach_div_(list(tensors), list(numbers))
