"""Layers whose per-sample gradients are products of one input and one cotangent: several are added at once.

What a small layer's squares cost is mostly the calls of the operations, of which most can be made for many layers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.several import add_each, multiply_each, square_each
from .._torch.versions import version
from .per_sample import Outer, PerSample
from .selection import Layer

__all__ = ["RankOne", "add_rank_one", "norms_of_rank_one", "rank_one"]


class RankOne(NamedTuple):
    """A layer with a weight, and perhaps a bias, and what one batch brings of it.

    Attributes:
        layer: the layer.
        inputs: shape ``(N, in)``.
        cotangents: shape ``(N, out)``.
        total: the sum of the cotangents.
        versions: how often both had been changed in place.
    """

    layer: Layer
    inputs: Tensor
    cotangents: Tensor
    total: Tensor
    versions: tuple[int, int]

    @property
    def gradients(self) -> dict[str, PerSample]:
        """The per-sample gradients of its parameters, by name."""
        a, g = (x.view(x.shape[0], 1, 1, x.shape[1]) for x in self.factors)
        both = {"weight": Outer(a, g), "bias": Outer(None, g)}
        return {name: both[name] for name in self.layer.parameters}

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Inputs and cotangents."""
        return self.inputs, self.cotangents

    def overwritten(self) -> bool:
        """Whether one of the factors was changed in place since."""
        return (version(self.inputs), version(self.cotangents)) != self.versions


def rank_one(layer: Layer, gradients: Mapping[str, PerSample], total: Tensor) -> RankOne | None:
    """A layer and its per-sample gradients as such a product; None where they are none."""
    gradients = {name: gradients[name] for name in layer.parameters}  # a rule tells that of a missing bias, too
    weight, bias = gradients.get("weight"), gradients.get("bias")
    if not isinstance(weight, Outer):
        return None
    a, g = weight
    if not isinstance(a, Tensor) or g.dim() != 4 or not g.shape[1] == g.shape[2] == a.shape[2] == 1:
        return None
    if len(gradients) > 2 or (len(gradients) == 2 and bias is None):
        return None
    if bias is not None and not (isinstance(bias, Outer) and bias.a is None and bias.g is g):
        return None
    if not a.shape[3] or not g.shape[3]:  # a layer without inputs or outputs
        return None
    samples = g.shape[0]
    inputs, cotangents = a.view(samples, a.shape[3]), g.view(samples, g.shape[3])
    return RankOne(layer, inputs, cotangents, total, (version(a), version(g)))


def add_rank_one(
    factors: Sequence[tuple[Tensor, Tensor]],
    outs: Sequence[Mapping[str, Tensor]],
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    keeps: Sequence[Tensor] | None = None,
) -> None:
    """``out ← beta · out + alpha · Σ_n (g_n a_nᵀ)²``: Σ_n g_n² (a_n²)ᵀ of weights, and Σ_n g_n² of biases.

    Args:
        factors: of each layer the inputs ``(N, in)`` and the cotangents ``(N, out)``.
        outs: of each layer the sums by the parameters' names, 1-D.
        beta: factor of what they held.
        alpha: factor of what is added.
        keeps: where given, of each layer a bool on the device: whether its squares count, or are zero whatever they
            are (nan).
    """
    inputs, cotangents = [a for a, _ in factors], [g for _, g in factors]
    of_a, of_g = square_each(inputs), square_each(cotangents)
    if keeps is not None:
        for squares in (*of_a, *of_g):
            squares.nan_to_num_()  # times zero, where it does not count
        multiply_each(of_g, keeps)
    biases = [own["bias"] for own in outs if "bias" in own]
    if biases:
        if beta != 1.0:
            multiply_each(biases, beta)
        found = [g.sum(0) for own, g in zip(outs, of_g, strict=True) if "bias" in own]
        add_each(biases, found, alpha=alpha)
    for own, a, g in zip(outs, of_a, of_g, strict=True):
        own["weight"].view(-1, a.shape[1]).addmm_(g.t(), a, beta=beta, alpha=alpha)


def norms_of_rank_one(factors: Sequence[tuple[Tensor, Tensor]], with_bias: Tensor) -> Tensor:
    """‖∂ℓ_n/∂θ‖² = ‖g_n‖² (‖a_n‖² + 1), the one of the bias, shape ``(layers, N)``.

    Args:
        factors: of each layer the inputs ``(N, in)`` and the cotangents ``(N, out)``.
        with_bias: of each, one where it has a bias, else zero.

    Source: Goodfellow (2015), "Efficient per-example gradient computations".
    """
    norms = torch.stack([torch.linalg.vector_norm(x, dim=1) for pair in factors for x in pair])
    of_a, of_g = norms.square_().view(len(factors), 2, -1).unbind(1)
    return torch.addcmul(with_bias[:, None] * of_g, of_g, of_a)
