"""Convolutions, as functions."""

from ..layout import DIM_ZERO
from ..per_sample import PerSample
from ..rules.convolution import convolution_gradients
from .call import OperationCall
from .registry import operation_rule


@operation_rule("ConvolutionBackward0")
def convolution(call: OperationCall, index: int) -> PerSample | None:
    """z = W ⋆ a + b."""
    if index == 0 or call.layout != DIM_ZERO or call.saved("transposed") or call.g.dim() < 3:
        return None
    if index == 2:
        return call.g.flatten(2).sum(2)
    stride, padding, dilation = (tuple(call.saved(name)) for name in ("stride", "padding", "dilation"))
    kernel, groups = tuple(call.shape(1)[2:]), call.saved("groups")
    return convolution_gradients(call.saved("input"), call.g, kernel, stride, padding, dilation, groups)["weight"]
