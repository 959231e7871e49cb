"""Convolutions, as functions."""

import torch.nn.functional as F

from ..layout import DIM_ZERO
from ..per_sample import PerSample
from ..rules.convolution import convolution_gradients
from .call import OperationCall
from .registry import operation_rule

__all__ = ["convolution"]


@operation_rule("ConvolutionBackward0")
def convolution(call: OperationCall, index: int) -> PerSample | None:
    """z = W ⋆ a + b."""
    if index == 0 or call.layout != DIM_ZERO or call.saved("transposed") or call.g.dim() < 3:
        return None
    if index == 2:
        return call.g.flatten(2).sum(2)
    a = F.pad(call.saved("input"), [side for pad in reversed(call.saved("padding")) for side in (pad, pad)])
    kernel = tuple(call.shape(1)[2:])
    stride, dilation = tuple(call.saved("stride")), tuple(call.saved("dilation"))
    return convolution_gradients(a, call.g, kernel, stride, dilation, call.saved("groups"))["weight"]
