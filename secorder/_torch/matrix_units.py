"""Matrix products in low precision whose sums are not rounded to it."""

import torch
from torch import Tensor

__all__ = ["product_in_float32"]


def product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """A batch of products of bfloat16 matrices with sums and results in float32.

    Args:
        left: shape ``(groups, rows, inner)``.
        right: shape ``(groups, inner, columns)``.

    Returns:
        shape ``(groups, rows, columns)``, float32: by matrix units on CUDA from PyTorch 2.8 on; elsewhere of the same
        factors in float32, in which each product is exact.
    """
    if left.is_cuda:
        try:
            return torch.bmm(left, right, out_dtype=torch.float32)
        except TypeError:  # of a PyTorch that has no such argument
            pass
    return torch.bmm(left.float(), right.float())
