"""Convolutions and transposed convolutions, of any number of spatial dimensions."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ..._torch.modules import convolution_padding
from ..patches import Patches, windows
from ..per_sample import Outer, PerSample
from .registry import expect_dims, rule_of, squares_of


@rule_of(nn.Conv1d, nn.Conv2d, nn.Conv3d, parameters=("weight", "bias"))
def convolution(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = W ⋆ a + b, any number of spatial dimensions and every setting of ``nn.ConvNd``."""
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    a, padding = _padded(module, inputs[0])
    expect_dims(module, a, len(module.kernel_size) + 2)
    return convolution_gradients(a, g, module.kernel_size, module.stride, padding, module.dilation, module.groups)


def convolution_gradients(
    a: Tensor,
    g: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    *,
    of_cotangents: bool = False,
) -> dict[str, PerSample]:
    """Of weight and bias, for an input ``a`` that zeros are added to at either end of each spatial dimension."""
    factor = g.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)
    fan_in = a.shape[1] // groups * math.prod(kernel)
    shape = (len(a), groups, math.prod(g.shape[2:]), fan_in)
    patches = Patches(a, kernel, stride, dilation, groups, shape, padding, of_cotangents)
    return {"weight": Outer(patches, factor), "bias": Outer(None, factor)}


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input, and the zeros that are still to be added at either end of each spatial dimension."""
    sides, zeros = convolution_padding(module), module.padding_mode == "zeros"
    if zeros and sides[::2] == sides[1::2]:
        return a, tuple(sides[-2::-2])
    if any(sides):
        a = F.pad(a, sides, "constant" if zeros else module.padding_mode)
    return a, (0,) * len(module.kernel_size)


@rule_of(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, parameters=("weight", "bias"))
def transposed_convolution(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = Wᵀ-convolution of a: the adjoint of a convolution, so that a and g change places."""
    assert isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    a, groups, spatial = inputs[0], module.groups, len(module.kernel_size)
    expect_dims(module, a, spatial + 2)
    # The convolution that this one is the adjoint of sees g, padded, at the positions of a; rows that
    # ``output_padding`` added and that no position reaches are cut off.
    padding = [int(pad) for pad in module.padding]
    seen = F.pad(g, [side for pad in reversed(padding) for side in (pad, pad)])
    seen = windows(seen, module.kernel_size, module.stride, module.dilation, a.shape[2:])
    seen = seen.unflatten(1, (groups, -1))
    products = a.flatten(2).unflatten(1, (groups, -1)) @ seen.transpose(2, 3)
    return {"weight": products.reshape(-1, *module.weight.shape), "bias": g.flatten(2).sum(2)}


@squares_of(transposed_convolution)
def transposed_convolution_squared(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """The same in factors, no sample's gradient formed: patches of g, and a in the place of cotangents."""
    assert isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    a, padding = inputs[0], tuple(map(int, module.padding))
    expect_dims(module, a, len(padding) + 2)
    sizes = zip(a.shape[2:], g.shape[2:], module.kernel_size, module.stride, padding, module.dilation, strict=True)
    ends = [(size - 1) * step + gap * (k - 1) + 1 - out - pad for size, out, k, step, pad, gap in sizes]
    seen = g
    if ends != list(padding):  # ``output_padding``: some rows at the end are seen in place of zeros, or not at all
        seen = F.pad(g, [side for both in reversed([*zip(padding, ends, strict=True)]) for side in both])
        padding = (0,) * len(padding)
    settings = module.kernel_size, module.stride, padding, module.dilation, module.groups
    own = convolution_gradients(seen, a, *settings, of_cotangents=True)
    return {"weight": own["weight"], "bias": g.flatten(2).sum(2)}
