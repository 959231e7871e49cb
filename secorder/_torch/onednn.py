"""Matrix products of float32 on a CPU by oneDNN, which knows the vector units of whatever processor it runs on.

PyTorch multiplies matrices by MKL, which makes no use of AVX-512 on processors of other makers than its own: on one of
AMD's, oneDNN is twice as fast. It is reached by the operator that ``torch.compile`` puts in place of a linear layer,
which can't be differentiated.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["linear_by_onednn", "multiplied_by_onednn", "product_by_onednn"]

#: Multiplications from which on one product is worth a call of its own: what oneDNN gains is more than a call costs,
#: and two threads have enough to share (measured from 64 to 4,608 rows and columns, on one thread and on two).
ALONE = 1 << 22


def multiplied_by_onednn(like: Tensor, multiplications: int) -> bool:
    """Whether a product of two matrices of a tensor's kind, of so many multiplications, is for oneDNN.

    By shape alone, so that a run can be repeated bit for bit.
    """
    if multiplications < ALONE or like.device.type != "cpu" or like.dtype is not torch.float32:
        return False
    return bool(torch.backends.mkldnn.enabled) and _has_operator()


def product_by_onednn(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right [+ bias]`` of matrices of float32, which nothing is differentiated through; in new memory.

    Of a right one whose rows are apart from each other, as are a sample's of a sequence that has its steps first,
    oneDNN has no fast product, but one that takes a thousand times as long: that is copied.
    """
    if not (right.is_contiguous() or right.t().is_contiguous()):
        right = right.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(left, right.t(), bias, "none", [], "")
    return product


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of a matrix x, to be differentiated by x alone, and once, also by vmap; its result has a node."""
    values = weight.detach(), None if bias is None else bias.detach()
    result: Tensor = _Linear.apply(x, *values, _one())  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    """The product; a leaf besides, so that there is a node where no input requires a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return product_by_onednn(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        product = _Product.apply(g, weight) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
        return product, None, None, None


class _Product(torch.autograd.Function):
    """:func:`product_by_onednn`, of whose left factors vmap may stack many."""

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return product_by_onednn(left, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is differentiated."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], left: Tensor, right: Tensor) -> tuple[Tensor, int]:
        left = left.movedim(in_dims[0], 0)
        return product_by_onednn(left.flatten(0, 1), right).view(*left.shape[:2], -1), 0


@cache
def _one() -> Tensor:
    """A leaf that nothing depends on."""
    return torch.zeros((), requires_grad=True)


@cache
def _has_operator() -> bool:
    """Whether this PyTorch was built with it; on other processors than those with AVX2 nothing was measured."""
    capable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return capable and hasattr(torch.ops.mkldnn, "_linear_pointwise")
