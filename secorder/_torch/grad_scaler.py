"""Whether a ``torch.amp.GradScaler`` has multiplied a loss: its factor is what an operation of the graph has saved."""

import gc
import math
import types
from typing import Any

import torch
from torch import Tensor

from .graph import Node, operation_of, recomputed
from .loss_terms import terms


def multiplied_by_scaler(root: Node) -> bool:
    """Whether what a backward pass begins at is multiplied by a scaler's factor, or made by arithmetic of what is."""
    for node in terms(root):  # of one that is recomputed, what it has saved would be computed again
        if operation_of(node) == "Mul" and not recomputed(node) and _of_scaler(node._saved_other):
            return True
    return False


def _of_scaler(factor: Tensor | float | None) -> bool:
    """Whether a number is what a scaler holds, or a copy of it, which multiplies several losses at once."""
    if not isinstance(factor, Tensor) or factor.dim() or factor.dtype != torch.float32:
        return False
    if factor.is_meta or factor.requires_grad:
        return False
    holders = gc.get_referrers(factor)
    for holder in holders:
        attributes = holder if type(holder) is dict else {}
        if _is_scaler(holder) or (attributes.get("_scale") is factor and "_growth_factor" in attributes):
            return True
    value = float(factor)
    if math.frexp(value)[0] != 0.5 or not all(map(_of_a_call, holders)):
        return False  # no power of two, or held
    return any(x._scale is not None and float(x._scale) == value for x in _scalers())


def _scalers() -> list[Any]:
    """All that there are, of any kind: objects refer to their classes."""
    kinds: list[type] = [torch.amp.GradScaler]
    for kind in kinds:  # which grows
        kinds.extend(kind.__subclasses__())
    return [x for x in gc.get_referrers(*kinds) if _is_scaler(x)]


def _is_scaler(holder: Any) -> bool:
    return issubclass(type(holder), torch.amp.GradScaler)


def _of_a_call(holder: Any) -> bool:
    """Whether it lives as long as a call: a frame, or the copies that a scaler makes, by device."""
    return type(holder) is types.FrameType or (type(holder) is dict and all(type(x) is torch.device for x in holder))
