"""PyTorch's weight normalisation by elementary operations: its own has no exact second derivatives.

The backward pass of its backward pass takes the norm that the forward saved for a constant.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from .composite_norms import Composite


def differentiable_weight_norm(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """Inside, the weights of modules that PyTorch normalises can be differentiated twice."""
    return Composite({torch._weight_norm: _weight_norm}) if any(map(_normalised, modules)) else nullcontext()


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    wide = v.to(torch.promote_types(v.dtype, torch.float32))  # as PyTorch's own
    return (wide * (g.to(wide.dtype) / torch.norm_except_dim(wide, 2, dim))).to(v.dtype)


def _normalised(module: nn.Module) -> bool:
    """Whether PyTorch normalises a weight of a module, by a hook or a parametrization."""
    holders: Any = module.parametrizations if is_parametrized(module) else {}
    return any(isinstance(hook, WeightNorm) for hook in module._forward_pre_hooks.values()) or any(
        isinstance(p, _WeightNorm) for name in holders for p in holders[name]
    )
