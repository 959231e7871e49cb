"""Cotangents on the model's output pulled back, and whether what comes of them is linear in them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch.vjp import stacked_vjp
from ..errors import AttributionError
from ..layers.dtypes import rounding
from .roots import Columns

__all__ = ["pull_back", "random_numbers", "require_linear_backward", "require_sum"]


def pull_back(
    model_outputs: Sequence[Tensor], leaves: Sequence[Tensor], stack: Tensor, create_graph: bool
) -> dict[int, Tensor]:
    """Cotangents (K, N, C) on the outputs at the leaves, by ``id(leaf)``."""
    sizes = [f[0].numel() for f in model_outputs]
    cotangents = [
        part.reshape(len(stack), *f.shape).to(f.dtype)
        for part, f in zip(stack.split(sizes, 2), model_outputs, strict=True)
    ]
    found = stacked_vjp(model_outputs, leaves, cotangents, create_graph=create_graph)
    return dict(zip((id(leaf) for leaf in leaves), found, strict=True))


def random_numbers(size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers, the same in every dtype."""
    return torch.randn(size, generator=generator, dtype=torch.float64, device=generator.device).to(like)


def require_linear_backward(
    model_outputs: Sequence[Tensor], ends: Sequence[Tensor], pairs: Columns, generator: torch.Generator
) -> None:
    """Raise :class:`AttributionError` unless the backward of two cotangents together is the sum of theirs, to rounding.

    Both are made of those that are to be pulled back. Else it is not multiplication with a Jacobian.
    """
    one = pairs.mixture(generator).detach()
    other = one * -(1.5 + random_numbers(one.shape[1], generator, one).abs())[:, None]
    found = [pull_back(model_outputs, ends, stack, False) for stack in (one, other, one + other)]
    require_sum(ends, *found)


def require_sum(
    ends: Sequence[Tensor], one: dict[int, Tensor], other: dict[int, Tensor], both: dict[int, Tensor]
) -> None:
    """Raise unless what is pulled back of two cotangents' sum is the sum of theirs, by ``id`` of where it ends.

    What is far below the others' gradients may be all rounding, as that of a bias that a normalisation takes off again.

    Raises:
        AttributionError: it is not.
    """
    pulled = [tuple(found[id(end)].detach() for found in (one, other, both)) for end in ends if end.numel()]
    sizes = [torch.maximum(first.abs(), second.abs()).amax() for first, second, _ in pulled]
    if not sizes:
        return
    largest = torch.stack([size.to(sizes[0]) for size in sizes]).amax()
    for (first, second, together), size in zip(pulled, sizes, strict=True):
        bound = rounding(together.dtype) * size.maximum(largest.to(size) / 16)
        if bool(((first + second - together).abs() > bound).any()):
            raise AttributionError(
                "the backward pass of the model is not linear in the gradient that it starts from (a hook that clamps "
                "or scales gradients, a custom autograd.Function), so that there is no Jacobian to multiply with: "
                'remove it, or ask for the empirical Fisher; hessian_diagonal(method="exact") takes it as it is.'
            )
