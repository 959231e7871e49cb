"""Are samples independent of one another in the model?

While some samples are replaced by others, the rest must keep their output. The sets of replaced samples are chosen so
that for every ordered pair of samples some set holds the second and not the first: an influence of one sample on
another shows unless it is below rounding for the very replacement.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, islice
from math import comb
from typing import Any

import torch
from torch import Tensor

from .._torch.failures import is_missing_graph
from .._torch.pytree import map_tensors, tensors_in
from .._torch.vjp import stacked_vjp
from ..batch import sample_dimension
from ..layers.dtypes import rounding
from ..layers.layout import DIM_ZERO, Layout
from .isolation import IsolatedModel

__all__ = [
    "block_diagonal",
    "changed_entries",
    "linear_products",
    "outputs_independent",
    "over_samples",
    "sample_bits",
    "separating_masks",
    "with_neighbours",
    "without_gradients",
]


def separating_masks(count: int) -> Tensor:
    """Masks (B, N), B about log₂ N: for every ordered pair (n, m) some mask holds m and not n.

    Each sample gets a different word of B bits with exactly ⌊B/2⌋ ones, so that no word covers another (Sperner).
    """
    if count == 1:
        return torch.zeros(0, 1, dtype=torch.bool, device="cpu")
    bits = next(b for b in range(2, count + 2) if comb(b, b // 2) >= count)
    masks = torch.zeros(bits, count, dtype=torch.bool, device="cpu")
    for sample, word in enumerate(islice(combinations(range(bits), bits // 2), count)):
        masks[list(word), sample] = True
    return masks


def outputs_independent(
    isolated: IsolatedModel, inputs: Any, count: int, sample_dim: int, forward: Callable[[Any], Any] | None = None
) -> bool:
    """Whether every sample's output stays as it is while others are replaced by their neighbours in the batch.

    Args:
        isolated: the borrowed model.
        inputs: the batch.
        count: its number of samples.
        sample_dim: where they are in the inputs.
        forward: how to run the model on inputs; by default as a one-shot call does.
    """
    run = forward or isolated.forward
    base = [t.detach().clone() for t in tensors_in(without_gradients(run, inputs))]
    for mask in separating_masks(count):
        batch = map_tensors(partial(with_neighbours, mask, count, sample_dim), inputs)
        for before, after in zip(base, tensors_in(without_gradients(run, batch)), strict=True):
            dim = sample_dimension(before, count, sample_dim)
            if dim is None or not (before.is_floating_point() or before.is_complex()):
                continue
            kept = ~mask.to(before.device)
            if bool(changed_entries(before, after.detach()).movedim(dim, 0)[kept].any()):
                return False
    return True


def without_gradients(run: Callable[[Any], Any], inputs: Any) -> Any:
    """``run(inputs)`` without a graph, unless the model needs one to differentiate itself."""
    try:
        with torch.no_grad():
            return run(inputs)
    except RuntimeError as error:
        if not is_missing_graph(error):
            raise
    return run(inputs)


def changed_entries(before: Tensor, after: Tensor) -> Tensor:
    """Which entries differ by more than rounding; infinite ones (masked logits) may stay so."""
    if before.is_complex():
        return changed_entries(torch.view_as_real(before.resolve_conj()), torch.view_as_real(after.resolve_conj())).any(
            -1
        )
    finite = before[before.isfinite()].abs()
    bound = rounding(before.dtype) * (finite.amax() if finite.numel() else 0.0)
    return ~((before == after) | ((before - after).abs() <= bound) | (before.isnan() & after.isnan()))


def with_neighbours(mask: Tensor, count: int, sample_dim: int, tensor: Tensor) -> Tensor:
    """Some samples replaced by their neighbours, a little scaled: samples that are all alike must change too."""
    dim = sample_dimension(tensor, count, sample_dim)
    if dim is None:
        return tensor
    if tensor.layout != torch.strided:
        return with_neighbours(mask, count, sample_dim, tensor.to_dense()).to_sparse(layout=tensor.layout)
    here = mask.to(tensor.device).view(*(-1 if d == dim else 1 for d in range(tensor.dim())))
    other = tensor.roll(1, dim)
    return torch.where(
        here, other if not (tensor.is_floating_point() or tensor.is_complex()) else other * 1.03125, tensor
    )


def over_samples(values: Tensor, like: Tensor, layout: Layout) -> Tensor:
    """Values (K, N) of samples, spread over tensors of a layout: shape ``(K, *like.shape)``."""
    split = layout.split(like.detach())
    stacked = values.view(*values.shape, *(1,) * (split.dim() - 1)).expand(-1, *split.shape)
    return stacked if layout == DIM_ZERO else torch.stack([layout.join(v) for v in stacked])


def sample_bits(count: int, device: torch.device | None = None) -> Tensor:
    """Masks (B, N) of the samples whose index has bit b set: any two samples differ in at least one of them."""
    index = torch.arange(count, device=device)
    return torch.stack([(index >> b) & 1 for b in range((count - 1).bit_length())] or [index]).bool()


def block_diagonal(
    output_gradients: Sequence[Tensor | None],
    points: Sequence[Tensor],
    layouts: Sequence[Layout],
    generator: torch.Generator,
) -> bool:
    """Whether a Hessian is block diagonal over samples: exactly zero between any two of them.

    For each bit of the sample index, a random v on the samples with that bit is multiplied by the Hessian; the other
    samples' rows must be exactly zero. Two samples differ in a bit, so a coupled pair escapes only where the product
    with a random v vanishes: with probability zero in exact arithmetic, or by underflow.

    Args:
        output_gradients: differentiable gradients of a scalar with respect to ``points``.
        points: the tensors that the Hessian is taken in.
        layouts: where each one's samples are.
        generator: for the random v.
    """
    count = layouts[0].size(points[0])
    if count == 1:
        return True
    bits = sample_bits(count, points[0].device)
    masks = [over_samples(bits, x, layout) for x, layout in zip(points, layouts, strict=True)]
    vectors = [
        torch.randn(mask.shape[1:], generator=generator, dtype=x.dtype, device=generator.device).to(x.device) * mask
        for x, mask in zip(points, masks, strict=True)
    ]
    products = stacked_vjp(output_gradients, points, vectors)
    return not any(bool((u.masked_fill(mask, 0) != 0).any()) for u, mask in zip(products, masks, strict=True))


def linear_products(
    output_gradients: Sequence[Tensor | None], points: Sequence[Tensor], generator: torch.Generator
) -> bool:
    """Whether products with a Hessian are linear in the vector, to rounding.

    They are, unless the backward pass of some operation is not, such as that of a hook that clamps gradients.

    Args:
        output_gradients: differentiable gradients of a scalar with respect to ``points``.
        points: the tensors that the Hessian is taken in.
        generator: for random vectors.
    """

    def random(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)

    pairs = [(random(x), random(x)) for x in points]
    found = stacked_vjp(output_gradients, points, [torch.stack([v, w, v + w]) for v, w in pairs])
    for one, other, both in (u.unbind() for u in found):
        if not both.numel():
            continue
        bound = rounding(both.dtype) * torch.maximum(one.abs(), other.abs()).amax()
        if bool(((one + other - both).abs() > bound).any()):
            return False
    return True
