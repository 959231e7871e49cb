"""Layers whose per-sample gradients are products of one input and one cotangent: several are added at once.

What a small layer's squares cost is mostly the calls of the operations, of which most can be made for many layers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.onednn import multiplied_by_onednn, product_by_onednn
from .._torch.versions import versions
from .per_sample import Outer, PerSample
from .selection import Layer


class FactorNorms(NamedTuple):
    """The norms of the factors of per-sample gradients that are products of one input and one cotangent."""

    inputs: Tensor  #: ‖a_n‖, shape ``(…, N)``
    cotangents: Tensor  #: ‖g_n‖, likewise
    with_bias: bool  #: whether there is a bias, whose input is one

    def squares(self) -> Tensor:
        """``‖∂ℓ_n/∂θ‖² = ‖g_n‖² (‖a_n‖² + 1)``, the one of the bias.

        Source: Goodfellow (2015), "Efficient per-example gradient computations".
        """
        of_g, of_a = self.cotangents.square(), self.inputs.square()
        return torch.addcmul(of_g, of_g, of_a) if self.with_bias else of_g * of_a


class RankOne(NamedTuple):
    """A layer with a weight, and perhaps a bias, and what one batch brings of it."""

    layer: Layer
    inputs: Tensor  #: shape ``(N, in)``
    cotangents: Tensor  #: shape ``(N, out)``
    versions: list[int]  #: how often both had been changed in place

    @property
    def gradients(self) -> dict[str, PerSample]:
        """The per-sample gradients of its parameters, by name."""
        a, g = (x.view(x.shape[0], 1, 1, x.shape[1]) for x in self.factors)
        both = {"weight": Outer(a, g), "bias": Outer(None, g)}
        return {name: both[name] for name in self.layer.parameters}

    def norms(self) -> FactorNorms:
        """The norms of its factors; each is read once, and nothing is written but these."""
        norm = torch.linalg.vector_norm
        return FactorNorms(norm(self.inputs, dim=1), norm(self.cotangents, dim=1), "bias" in self.layer.parameters)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Inputs and cotangents."""
        return self.inputs, self.cotangents


class Plan(NamedTuple):
    """Of a layer whose calls, where their rows are samples, may wait to be added together with those of others."""

    dtype: torch.dtype  #: of its parameters, and of what is accumulated of it
    device: torch.device  #: where these are

    def admits(self, inputs: Tensor, cotangents: Tensor, others: Sequence[RankOne]) -> bool:
        """Whether the factors of a call are such as it was made for, and those of the first that waits already are."""
        other = others[0].cotangents if others else cotangents
        return (
            inputs.dim() == cotangents.dim() == 2
            and inputs.layout is torch.strided
            and inputs.dtype is cotangents.dtype is other.dtype is self.dtype
            and inputs.device == cotangents.device == other.device == self.device
        )


def overwritten(layers: Sequence[RankOne]) -> list[str]:
    """The names of the layers of which a factor was changed in place since."""
    now = versions([x for one in layers for x in (one.inputs, one.cotangents)])
    if now == [number for one in layers for number in one.versions]:
        return []
    return [one.layer.name for i, one in enumerate(layers) if now[2 * i : 2 * i + 2] != one.versions]


def rank_one(layer: Layer, gradients: Mapping[str, PerSample]) -> RankOne | None:
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
    return RankOne(layer, inputs, cotangents, versions((a, g)))


def squares_by_onednn(one: RankOne, alpha: float) -> Tensor | None:
    """``α Σ_n (∂ℓ_n/∂θ)²`` of all parameters in one vector; None where the product is not for oneDNN.

    The vector is the memory that oneDNN puts its product in: to copy that takes a fifth of the time, and half of the
    memory, which is likely to come anew from the operating system. The bias has its place in rows of the product that
    come of zeros behind the cotangents.
    """
    a, g = one.factors
    (count, fan_in), width = a.shape, g.shape[1]
    if next(iter(one.layer.parameters)) != "weight" or not multiplied_by_onednn(g, count * width * fan_in):
        return None  # a weight that was registered anew comes after the bias
    behind = width if "bias" in one.layer.parameters else 0
    squares = g * g
    left = g.new_empty(width + -(-behind // fan_in), count)
    left[:width].copy_(squares.t())
    left[width:].zero_()
    product = product_by_onednn(left, (a * alpha).mul_(a))
    vector: Tensor = product.new_empty(0)
    vector.set_(product.untyped_storage(), 0, (width * fan_in + behind,), (1,))
    if behind:
        torch.mul(squares.sum(0), alpha, out=vector[width * fan_in :])
    return vector
