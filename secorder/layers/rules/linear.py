"""Layers that multiply their input by a matrix."""

import math

from torch import Tensor, nn

from ...errors import AttributionError
from ..per_sample import Outer, PerSample
from .registry import rule_of


@rule_of(nn.Linear, parameters=("weight", "bias"), any_leading_dim=True)
def linear(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z = a Wᵀ + b, over any number of positions between the sample and the feature dimension."""
    a = inputs[0]
    if a.dim() < 2 or g.dim() < 2:
        raise AttributionError("a single vector holds no dimension for samples.")
    samples, positions = a.shape[0], math.prod(a.shape[1:-1])
    a = a.reshape(samples, 1, positions, a.shape[-1])
    g = g.reshape(samples, 1, positions, g.shape[-1])
    return {"weight": Outer(a, g), "bias": Outer(None, g)}


@rule_of(nn.Bilinear, parameters=("weight", "bias"), any_leading_dim=True)
def bilinear(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, PerSample]:
    """z_k = x₁ᵀ W_k x₂ + b_k: a linear layer on the products of its two inputs."""
    first, second = inputs
    products = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
    return linear(module, (products,), g)
