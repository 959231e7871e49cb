"""Matrix products in low precision whose sums are not rounded to it."""

import torch
from torch import Tensor


def product_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """Products of bfloat16 matrices ``(groups, rows, inner)`` and ``(groups, inner, columns)`` with sums in float32.

    By matrix units on CUDA; elsewhere of the same factors in float32, in which each product is exact.
    """
    if left.is_cuda:
        try:
            return torch.bmm(left, right, out_dtype=torch.float32)
        except TypeError:  # of a PyTorch that has no such argument
            pass
    return torch.bmm(left.float(), right.float())
