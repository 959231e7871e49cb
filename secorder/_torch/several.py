"""Operations on many tensors at once: a thousand small ones take one call, and on an accelerator few kernels.

None of them takes an empty list; whatever is added or multiplied is of the dtype and on the device of its tensor.
"""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

#: Tensors on the host that are not worth a call for all.
FEW = 8

_DTYPE, _HALF = attrgetter("dtype"), frozenset((torch.float16, torch.bfloat16))


def _one_by_one(tensors: Sequence[Tensor]) -> bool:
    """Whether a call for each takes less time than one for all, whose code nothing else of a training step runs."""
    return len(tensors) <= FEW and tensors[0].is_cpu


def add_each(totals: Sequence[Tensor], parts: Sequence[Tensor], *, beta: float = 1.0, alpha: float = 1.0) -> None:
    """``total ← beta · total + alpha · part`` of each tensor and another one of its shape, in place."""
    _scale_each(totals, beta)
    if _one_by_one(totals):
        for total, part in zip(totals, parts, strict=True):
            total.add_(part, alpha=alpha)
    else:
        torch._foreach_add_(list(totals), list(parts), alpha=alpha)


def add_products(
    totals: Sequence[Tensor],
    parts: Sequence[Tensor],
    factors: Sequence[Tensor],
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> None:
    """``total ← beta · total + alpha · part · factor`` of each, where a factor is a number or a bool, in place."""
    _scale_each(totals, beta)
    # alpha times a part might be infinite, and that times zero no number
    torch._foreach_addcmul_(list(totals), list(factors), list(parts), value=alpha)


def _scale_each(tensors: Sequence[Tensor], beta: float) -> None:
    if beta != 1.0:
        torch._foreach_mul_(list(tensors), beta)


def multiply_each(tensors: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply each tensor by a number or a bool of its own, in place."""
    torch._foreach_mul_(list(tensors), list(factors))


def set_to_zero(tensors: Sequence[Tensor]) -> None:
    """Set all elements of each tensor to zero, in place."""
    torch._foreach_zero_(list(tensors))


def square_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The squares of each tensor's elements."""
    return [t * t for t in tensors] if _one_by_one(tensors) else list(torch._foreach_mul(list(tensors), list(tensors)))


def divide_each(tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Divide each tensor by a number of its own, in place."""
    torch._foreach_div_(list(tensors), list(numbers))


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each tensor, of half precision in float32."""
    if _one_by_one(tensors) or not _HALF.isdisjoint(map(_DTYPE, tensors)):
        return [torch.linalg.vector_norm(t, dtype=torch.float32 if t.dtype in _HALF else None) for t in tensors]
    return list(torch._foreach_norm(list(tensors)))
