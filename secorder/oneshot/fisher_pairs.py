"""The pairs of cotangents on the model's output that make a Fisher of second order."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..layers.selection import Layer
from ..results import LayerInfo, Strategy
from .measurement import Measurement
from .output_hessian import Pairs, basis_pairs, output_hessian, roots

__all__ = ["FisherType", "Found", "collect", "second_order_pairs"]

FisherType = Literal["empirical", "type-2", "mc"]

#: Per layer its diagonal by parameter, and how it was come by.
Found = dict[str, tuple[list[Tensor], LayerInfo]]


def second_order_pairs(
    task: Measurement,
    output_gradients: Sequence[Tensor | None],
    points: Sequence[Tensor],
    fisher_type: FisherType,
    num_draws: int,
) -> Pairs:
    """Pairs of which Σ_c u_c v_cᵀ is every sample's ∂²ℓ_n/∂f_n², or has it as its expectation.

    Args:
        task: the measurement.
        output_gradients: of Σ_n ℓ_n in ``points``, differentiable.
        points: samples in dim 0.
        fisher_type: ``"type-2"`` or ``"mc"``.
        num_draws: draws of ``"mc"``.
    """
    if task.create_graph:  # a square root is not differentiable where eigenvalues meet
        pairs = basis_pairs(output_hessian(output_gradients, points, task.chunk_size, create_graph=True))
    else:
        pairs = roots(output_gradients, points, task.chunk_size)
    return pairs if fisher_type == "type-2" else _drawn(task, pairs, num_draws)


def _drawn(task: Measurement, pairs: Pairs, num_draws: int) -> Pairs:
    """Monte Carlo: random signs mix all columns into one pair, drawn anew for each sample and draw."""
    shape = (num_draws, *pairs.u.shape[:2])
    signs = torch.randint(0, 2, shape, generator=task.generator, device=task.generator.device)
    signs = (signs * 2 - 1).to(pairs.u) / num_draws**0.5
    u = torch.einsum("mkn,kno->mno", signs, pairs.u)
    other = pairs.v if pairs.sign is None else pairs.u * pairs.sign[..., None]
    return Pairs(u, None if other is None else torch.einsum("mkn,kno->mno", signs, other))


def collect(layers: Sequence[Layer], totals: Sequence[Tensor], strategy: Strategy) -> Found:
    """Totals by parameter, put together by layer."""
    rest = iter(totals)
    return {layer.name: ([next(rest).flatten() for _ in layer.parameters], LayerInfo(strategy)) for layer in layers}
