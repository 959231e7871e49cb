"""PyTorch's weight normalisation, and whether its second derivative is exact."""

from functools import cache

import torch
from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm


def weight_normalised(module: nn.Module) -> bool:
    """Whether a weight of a module is normalised by PyTorch's own kernel, along its first or last dimension."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    dims = [(hook.dim, getattr(module, f"{hook.name}_v").dim()) for hook in hooks]
    for holder in getattr(module, "parametrizations", {}).values():
        dims += [(p.dim, holder.original1.dim()) for p in holder if isinstance(p, _WeightNorm)]
    return any(dim in (0, size - 1) for dim, size in dims)


@cache
def second_derivative_is_exact() -> bool:
    """Whether a derivative of the kernel's backward pass is exact: it may take the saved norm of v for a constant."""
    v = torch.tensor([[0.6, 0.8]], dtype=torch.float64, device="cpu", requires_grad=True)
    g = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    with torch.enable_grad():
        kernel, elementary = torch._weight_norm(v, g, 0), v * g / v.norm(dim=1, keepdim=True)
        derivatives = [torch.autograd.grad(w[0, 0], v, create_graph=True)[0] for w in (kernel, elementary)]
        found, expected = (torch.autograd.grad(derivative[0, 0], v)[0] for derivative in derivatives)
    return torch.allclose(found, expected)
