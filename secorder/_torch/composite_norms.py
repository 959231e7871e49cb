"""Normalisations by elementary operations: PyTorch's own have no exact third derivatives.

The backward pass of the backward pass of ``native_layer_norm`` and ``native_batch_norm`` takes for constants the mean
and the variance that the forward saved: a gradient of a second derivative would be wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Composite(TorchFunctionMode):
    """Inside, functions are exchanged for compositions of operations that can be differentiated at will.

    Args:
        compositions: by function; :data:`NORMS` of layer, batch and instance normalisation.
    """

    def __init__(self, compositions: Mapping[Any, Callable[..., Tensor]]) -> None:
        super().__init__()
        self._compositions = compositions

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at one call."""
        return self._compositions.get(function, function)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _affine(_standardised(input, list(range(-len(normalized_shape), 0)), eps), weight, bias).to(input.dtype)


def _by_channel(norm: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """``F.batch_norm``, which takes statistics over samples and positions, or ``F.instance_norm``, over positions."""
    given = signature(norm).bind(*args, **kwargs)
    given.apply_defaults()
    input, running_mean, running_var, weight, bias, by_input, momentum, eps = given.args
    if not by_input:
        return norm(*given.args)
    with torch.no_grad():  # the running statistics
        norm(input, running_mean, running_var, None, None, by_input, momentum, eps)
    dims = [0] * (norm is F.batch_norm) + list(range(2, input.dim()))
    shape = 1, -1, *(1,) * (input.dim() - 2)
    parameters = [None if p is None else p.view(shape) for p in (weight, bias)]
    return _affine(_standardised(input, dims, eps), *parameters).to(input.dtype)


def _standardised(input: Tensor, dims: list[int], eps: float) -> Tensor:
    """In float32 at least, as PyTorch's own."""
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


NORMS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: partial(_by_channel, F.batch_norm),
    F.instance_norm: partial(_by_channel, F.instance_norm),
}
