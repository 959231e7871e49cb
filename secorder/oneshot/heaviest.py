"""Many columns: the heaviest of each sample, and the rest mixed by random signs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .hessian.budget import Budget
from .hessian.estimate import Estimate, average
from .roots import Columns, Draws, Pairs, Root

__all__ = ["Contraction", "Heaviest", "by_weight", "heaviest"]

#: Σ_k contract(u_k, v_k) of some columns, by parameter of all layers.
Contraction = Callable[[Columns], list[Tensor]]


@dataclass(frozen=True, eq=False)
class Heaviest:
    """Some columns of a root, of each sample its own.

    Attributes:
        root: of which.
        order: shape ``(N, J)``: which columns.
    """

    root: Root
    order: Tensor

    @property
    def num_columns(self) -> int:
        """How many of each sample."""
        return self.order.shape[1]

    def columns(self, ids: range) -> Pairs:
        """Some of them."""
        chosen = self.order.T[ids.start : ids.stop]
        coefficients = self.root.like.new_zeros(*chosen.shape, self.root.num_columns)
        pairs = self.root.mixed(coefficients.scatter_(2, chosen[..., None], 1.0))
        if self.root.right is not None or self.root.sign is None:
            return pairs
        return Pairs(pairs.u, None, self.root.sign.to(pairs.u.dtype).gather(1, chosen.T).T)

    def mixture(self, generator: torch.Generator) -> Tensor:
        """One of the root's; of one column, the column."""
        return self.columns(range(1)).u if self.num_columns == 1 else self.root.mixture(generator)


def heaviest(root: Root, share: float) -> Heaviest:
    """As many columns, by falling weight, as leave at most this share of the whole weight to the rest.

    A column's weight is its part of the trace of the loss's Hessian in the outputs, ``‖s_k‖²``. Each sample has its own
    order, and all of them as many columns.

    Args:
        root: whose weights are known.
        share: between 0 and 1.
    """
    assert root.weights is not None
    weights, order = root.weights().abs().double().sort(dim=1, descending=True)
    left = weights.sum() - weights.sum(0).cumsum(0)  # after one column, after two, …
    enough = (left <= share * weights.sum()).nonzero()
    return Heaviest(root, order[:, : int(enough[0]) + 1 if len(enough) else len(left)])


def by_weight(
    root: Root,
    budget: Budget,
    contract: Contraction,
    generator: torch.Generator,
    advance: Callable[[int], None] = lambda _: None,
) -> Estimate:
    """The contraction of all columns: that of the heaviest, and of the rest an unbiased estimate.

    Args:
        root: of the loss's Hessian.
        budget: ``rtol`` is the rest's share of the trace, and the relative error that draws go down to.
        contract: of some columns.
        generator: of the signs.
        advance: of a progress bar, by columns and draws.

    Returns:
        exact where draws would be no fewer than the columns that are left.
    """
    assert budget.rtol is not None
    some = heaviest(root, budget.rtol) if root.weights is not None else None
    count = some.num_columns if some else 0
    if count + budget.num_draws >= root.num_columns:
        values = contract(root)
        advance(root.num_columns)
        return Estimate(values)
    exact = contract(some) if some else []
    advance(count)

    def draw(number: int) -> list[Tensor]:
        draws = [contract(Draws.of(root, 1, generator, without=some.order if some else None)) for _ in range(number)]
        return [torch.stack(parts) for parts in zip(*draws, strict=True)]

    like: Sequence[Tensor] = exact or [torch.zeros_like(v[0]) for v in draw(1)]
    return average(draw, [torch.zeros_like(v) for v in like], budget, 1, advance, exact)
