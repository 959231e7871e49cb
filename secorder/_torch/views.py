"""Tensors that are parts of others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .graph import Node


def lasting_place(tensor: Tensor) -> tuple[Node, int]:
    """The node, and which of its outputs, that the gradient on a tensor comes to even if that is overwritten.

    Of a view of all of another tensor, such as what a linear layer with a bias makes of a sequence, an operation in
    place takes the place of the view, and leads to the node of the other: its gradient has other dimensions.
    """
    node, place = tensor.grad_fn, (tensor.grad_fn, tensor.output_nr)
    if node is None or type(tensor) is not Tensor or not tensor._is_view():
        return place
    whole = tensor._base
    assert whole is not None
    before = (whole.grad_fn, whole.output_nr)
    in_order = whole.numel() == tensor.numel() and whole.is_contiguous() and tensor.is_contiguous()
    return before if in_order and node.next_functions == (before,) else place


def is_view(tensor: Tensor) -> bool:
    """Whether autograd knows it as a part of another tensor: an operation in place then puts new nodes in its place."""
    return tensor._is_view()


def cloned(tensor: Tensor) -> Tensor:
    """A clone that lies in memory as the tensor does: by its strides, operations choose how they compute.

    ``clone`` alone keeps the strides only of what has no gaps, and not of a slice of time steps, say.
    """
    copy = tensor.clone()
    gaps = type(tensor) is Tensor and tensor.layout is torch.strided and copy.stride() != tensor.stride()
    if not gaps or 0 in tensor.stride():  # what is expanded cannot be written to
        return copy
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=copy.dtype, device=copy.device).copy_(tensor)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """All parts in one vector: that of which they are parts, if they are all of it in their order."""
    base, end = parts[0]._base, 0
    if base is None or base.dim() != 1 or base.requires_grad:
        return torch.cat(list(parts))
    for part in parts:
        if part._base is not base or part.storage_offset() != base.storage_offset() + end or not part.is_contiguous():
            return torch.cat(list(parts))
        end += part.numel()
    return base if end == base.numel() else torch.cat(list(parts))
