"""Operations on many tensors at once: a thousand small ones take one call, and on an accelerator few kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_each", "divide_each"]


def add_each(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add to each tensor another one of its shape, in place.

    Args:
        totals: at least one.
        parts: as many; each of the dtype and on the device of its total.
    """
    torch._foreach_add_(list(totals), list(parts))


def divide_each(tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Divide each tensor by a number of its own, in place.

    Args:
        tensors: at least one.
        numbers: as many.
    """
    torch._foreach_div_(list(tensors), list(numbers))
