"""Whether a ``torch.amp.GradScaler`` has multiplied a loss: its factor is what an operation of the graph has saved."""

import gc

import torch
from torch import Tensor

from .graph import Node, operation_of

__all__ = ["multiplied_by_scaler"]

#: What may be between the loss that a backward pass begins at and those that are multiplied, and how many of these.
_BETWEEN = ("Add", "Div", "Mul")
_MOST = 16


def multiplied_by_scaler(root: Node) -> bool:
    """Whether what a backward pass begins at is multiplied by a scaler's factor, or a sum of what is.

    Args:
        root: the node that it begins at, which still holds what it has saved.
    """
    waiting = [root]
    for node in waiting:  # which grows
        if operation_of(node) not in _BETWEEN:
            continue
        if operation_of(node) == "Mul" and _of_scaler(node._saved_other):
            return True
        waiting.extend(x for x, _ in node.next_functions if x is not None and len(waiting) < _MOST)
    return False


def _of_scaler(factor: Tensor | None) -> bool:
    """Whether a number is what a scaler holds."""
    if factor is None or factor.dim() or factor.dtype != torch.float32 or factor.requires_grad:
        return False
    for holder in gc.get_referrers(factor):
        attributes = holder if type(holder) is dict else {}
        if isinstance(holder, torch.amp.GradScaler) or (
            attributes.get("_scale") is factor and "_growth_factor" in attributes
        ):
            return True
    return False
