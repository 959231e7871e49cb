"""Whether a ``torch.amp.GradScaler`` has multiplied a loss: its factor is what an operation of the graph has saved."""

import gc
import math
import types
from typing import Any

import torch
from torch import Tensor

from .graph import Node, operation_of, recomputed

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
        if operation_of(node) not in _BETWEEN or recomputed(node):  # to be asked, it would be computed again
            continue
        if operation_of(node) == "Mul" and _of_scaler(node._saved_other):
            return True
        waiting.extend(x for x, _ in node.next_functions if x is not None and len(waiting) < _MOST)
    return False


def _of_scaler(factor: Tensor | float | None) -> bool:
    """Whether a number is what a scaler holds."""
    if (
        not isinstance(factor, Tensor)
        or factor.dim()
        or factor.is_meta
        or factor.dtype != torch.float32
        or factor.requires_grad
    ):
        return False
    for holder in gc.get_referrers(factor):
        attributes = holder if type(holder) is dict else {}
        if isinstance(holder, torch.amp.GradScaler) or (
            attributes.get("_scale") is factor and "_growth_factor" in attributes
        ):
            return True
    return _is_copy(factor)


def _is_copy(factor: Tensor) -> bool:
    """Whether a number is a scaler's that multiplies several losses at once: by a copy, which no one else holds."""
    value = float(factor)
    if math.frexp(value)[0] != 0.5 or not all(map(_of_a_call, gc.get_referrers(factor))):
        return False  # no power of two, or held
    scalers = [x for x in gc.get_objects() if issubclass(type(x), torch.amp.GradScaler)]
    return any(x._scale is not None and float(x._scale) == value for x in scalers)


def _of_a_call(holder: Any) -> bool:
    """Whether it lives as long as a call: a frame, or the copies that a scaler makes, by device."""
    return type(holder) is types.FrameType or (type(holder) is dict and all(type(x) is torch.device for x in holder))
