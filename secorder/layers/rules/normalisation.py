"""Layers that scale and shift a normalised input."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..per_sample import PerSample
from .registry import expect_dims, rule_of


def _affine(normalised: Tensor, g: Tensor, kept: Sequence[int]) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β: products with the normalised input, summed over all dimensions but the sample's and ``kept``."""
    rest = [dim for dim in range(1, g.dim()) if dim not in kept]
    weight, bias = normalised * g, g
    return {"weight": weight.sum(rest), "bias": bias.sum(rest)} if rest else {"weight": weight, "bias": bias}


@rule_of(nn.LayerNorm, parameters=("weight", "bias"), any_leading_dim=True)
def layer_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β with x̂ normalised over the last dimensions."""
    assert isinstance(module, nn.LayerNorm)
    normalised = F.layer_norm(inputs[0], module.normalized_shape, eps=module.eps)
    return _affine(normalised, g, range(g.dim() - len(module.normalized_shape), g.dim()))


@rule_of(nn.RMSNorm, parameters=("weight",), any_leading_dim=True)
def rms_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x / rms(x) over the last dimensions."""
    assert isinstance(module, nn.RMSNorm)
    normalised = F.rms_norm(inputs[0], module.normalized_shape, eps=module.eps)
    return {"weight": _affine(normalised, g, range(g.dim() - len(module.normalized_shape), g.dim()))["weight"]}


@rule_of(nn.GroupNorm, parameters=("weight", "bias"))
def group_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β by channel, x̂ normalised over groups of channels of one sample."""
    assert isinstance(module, nn.GroupNorm)
    return _affine(F.group_norm(inputs[0], module.num_groups, eps=module.eps), g, [1])


#: By the number of their spatial dimensions, from one.
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@rule_of(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, parameters=("weight", "bias"))
def instance_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β by channel, x̂ normalised by the sample's own or, in eval mode, by running statistics."""
    assert isinstance(module, _INSTANCE_NORMS)
    expect_dims(module, inputs[0], next(i for i, kind in enumerate(_INSTANCE_NORMS, 3) if isinstance(module, kind)))
    if module.track_running_stats and not module.training:
        return _affine(_by_running_statistics(module, inputs[0]), g, [1])
    return _affine(F.instance_norm(inputs[0], eps=module.eps), g, [1])


@rule_of(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, parameters=("weight", "bias"))
def batch_norm(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = γ ⊙ x̂ + β by channel, x̂ normalised by running statistics or, in train mode, by the batch's."""
    assert isinstance(module, (*_BATCH_NORMS, nn.SyncBatchNorm))
    if module.training or module.running_mean is None:
        return _affine(F.batch_norm(inputs[0], None, None, training=True, eps=module.eps), g, [1])
    return _affine(_by_running_statistics(module, inputs[0]), g, [1])


def _by_running_statistics(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, (*_INSTANCE_NORMS, *_BATCH_NORMS, nn.SyncBatchNorm))
    assert module.running_mean is not None
    assert module.running_var is not None
    shape = (1, -1, *(1,) * (x.dim() - 2))
    scale = torch.rsqrt(module.running_var.to(x.dtype) + module.eps)
    return (x - module.running_mean.to(x.dtype).view(shape)) * scale.view(shape)
