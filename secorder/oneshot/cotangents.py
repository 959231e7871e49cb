"""Cotangents on the model's output pulled back, and whether what comes of them is linear in them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .._torch.vjp import split_like, stacked_vjp
from ..errors import AttributionError
from ..layers.dtypes import rounding
from .roots import Columns

#: A number for all samples that changes every bit, and how many times the rounding that it shows may be met elsewhere.
ALIKE, MEASURED = 1.7, 64.0


def pull_back(
    model_outputs: Sequence[Tensor], leaves: Sequence[Tensor], stack: Tensor, create_graph: bool
) -> dict[int, Tensor]:
    """Cotangents (K, N, C) on the outputs at the leaves, by ``id(leaf)``."""
    found = stacked_vjp(model_outputs, leaves, split_like(stack, model_outputs), create_graph=create_graph)
    return dict(zip(map(id, leaves), found, strict=True))


def require_linear_backward(
    model_outputs: Sequence[Tensor], ends: Sequence[Tensor], pairs: Columns, generator: torch.Generator
) -> None:
    """Raise :class:`AttributionError` unless the backward of two cotangents together is the sum of theirs, to rounding.

    Both are made of those that are to be pulled back, of opposite signs: what keeps positive gradients alone (guided
    backpropagation) is linear in those. Else it is not multiplication with a Jacobian. What is far below the others'
    gradients may be all rounding, as that of a bias that a normalisation takes off again: where sizes do not explain a
    difference, rounding is measured.
    """
    one = pairs.mixture(generator).detach()
    random = torch.randn(one.shape[1], generator=generator, dtype=torch.float64, device=generator.device)
    other = one * -(1.5 + random.abs().to(one))[:, None]
    first, second, both = [pull_back(model_outputs, ends, stack, False) for stack in (one, other, one + other)]
    if _is_sum(ends, first, second, both):
        return
    noise = _measured_rounding(ends, first, lambda number: pull_back(model_outputs, ends, number * one, False))
    if not _is_sum(ends, first, second, both, noise):
        raise AttributionError(
            "the backward pass of the model is not linear in the gradient that it starts from (a hook that clamps "
            "or scales gradients, a custom autograd.Function), so that there is no Jacobian to multiply with: "
            'remove it, or ask for the empirical Fisher; hessian_diagonal(method="exact") takes it as it is.'
        )


def _is_sum(
    ends: Sequence[Tensor],
    one: Mapping[int, Tensor],
    other: Mapping[int, Tensor],
    both: Mapping[int, Tensor],
    noise: Mapping[int, Tensor] | None = None,
) -> bool:
    pulled = [tuple(found[id(end)].detach() for found in (one, other, both)) for end in ends if end.numel()]
    sizes = [torch.maximum(first.abs(), second.abs()).amax() for first, second, _ in pulled]
    if not sizes:
        return True
    largest = torch.stack([size.to(sizes[0]) for size in sizes]).amax()
    bounds = [rounding(size.dtype) * size.maximum(largest.to(size) / 16) for size in sizes]
    if noise is not None:
        bounds = [bound + noise[id(end)] for bound, end in zip(bounds, [e for e in ends if e.numel()], strict=True)]
    return not any(
        bool(((first + second - together).abs() > bound).any())
        for (first, second, together), bound in zip(pulled, bounds, strict=True)
    )


def _measured_rounding(
    ends: Sequence[Tensor], plain: Mapping[int, Tensor], again: Callable[[float], Mapping[int, Tensor]]
) -> dict[int, Tensor]:
    """What may be rounding in gradients, by ``id(end)``, where it is more than their size tells.

    What nearly cancels on the way (a normalisation of two elements) is rounded relative to what it was before.
    Weighting all samples alike, ``again(number)``, shows that, and nothing else, where the backward pass is linear:
    times two, all bits but the exponent stay.
    """
    alike, twice = again(ALIKE), again(2.0)
    noise = {}
    for end in ends:
        g = plain[id(end)].detach()
        linear = bool(torch.equal(twice[id(end)].detach(), 2 * g))
        noise[id(end)] = (
            MEASURED * (alike[id(end)].detach() - ALIKE * g).abs().amax() if linear and end.numel() else g.new_zeros(())
        )
    return noise
