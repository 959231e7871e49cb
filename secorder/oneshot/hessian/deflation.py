"""Draws with the directions of largest curvature taken exactly, in each sample its own, and signs on what is left.

With Q an orthonormal basis of some directions and P = I − QQᵀ, ``H = HQQᵀ + HPP``: of the first part, products with the
columns of Q give the diagonal and the trace exactly; of the second, random signs v give ``E[HPv (Pv)ᵀ] = HPP``. So it
is unbiased whatever Q is, and where H is nearly zero outside of Q, little is left to chance. Q is the range of H on
some random signs (Meyer, Musco, Musco, Woodruff 2021, "Hutch++: optimal stochastic trace estimation"). Where H is block
diagonal over samples, each of them has directions of its own, which the same few products give.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch.vjp import chunks
from ...results import relative_error
from .budget import Budget
from .estimate import Draw

#: Products that decide what is easiest to estimate, each time.
PILOT_DRAWS = 4

#: Draws from which on directions may be taken exactly.
MIN_DRAWS = 32

#: Directions of a sample at most, and memory that those of all samples may take.
MAX_DIRECTIONS = 64
MAX_BYTES = 1 << 27

#: What all directions must leave of the squares of products, where each takes as much as the first ones: half as many
#: draws are left beside them.
WORTH = 0.25

#: What a few directions may add to the spread of draws beside them: of a nearly diagonal matrix, which signs alone give
#: nearly exactly, they add many times as much; elsewhere a few draws tell no better.
NO_WORSE = 1.5


@dataclass(frozen=True)
class Space:
    """Where vectors are drawn, what multiplies them, and what a product tells."""

    signs: Callable[[int], list[Tensor]]  #: so many vectors of random signs, stacked
    product: Callable[[list[Tensor]], list[Tensor]]  #: with a curvature, of stacked vectors
    #: what products and their vectors give, stacked: diagonals, or what is made of them
    values: Callable[[list[Tensor], list[Tensor]], list[Tensor]]
    rows: Callable[[Sequence[Tensor]], Tensor]  #: stacked vectors, sample by sample: shape (K, N, D)
    tensors: Callable[[Tensor], list[Tensor]]  #: the inverse
    size: int  #: products at a time

    def vectors(self, count: int, without: Tensor | None) -> list[Tensor]:
        """So many, besides some directions (N, D, k)."""
        vectors = self.signs(count)
        return vectors if without is None else self.tensors(_projected(self.rows(vectors), without))

    def draw(self, count: int, without: Tensor | None = None) -> list[Tensor]:
        """What so many draws give, besides some directions."""
        vectors = self.vectors(count, without)
        return self.values(self.product(vectors), vectors)


@dataclass(frozen=True)
class Pilot:
    """A few draws, made to decide by, and left out of the estimate."""

    spread: float  #: the variance of ``v ⊙ Hv``, summed up: of all elements off H's diagonal, the squares
    products: Tensor  #: Hv, sample by sample
    values: list[Tensor]  #: what they give


def may_pay(budget: Budget) -> bool:
    """Whether there may be draws enough."""
    return (budget.num_draws if budget.rtol is None else budget.max_draws) >= MIN_DRAWS


def pilot(space: Space, without: Tensor | None = None) -> Pilot:
    """Draw a few times; besides some directions, where they are given."""
    vectors = space.vectors(PILOT_DRAWS, without)
    products = space.product(vectors)
    u, v = space.rows(products), space.rows(vectors)
    return Pilot(float((u * v).double().var(0).sum()), u, space.values(products, vectors))


def deflated(
    space: Space, tried: Pilot, known: Sequence[Tensor], budget: Budget, advance: Callable[[int], None]
) -> tuple[Draw, list[Tensor], int] | None:
    """Draws beside some directions, what those give exactly, and the products that took; None where it won't pay."""
    planned = _planned(tried, known, budget)
    count, size = tried.products.shape[1:]
    directions = min(planned // 4, size // 4, MAX_DIRECTIONS)
    directions = min(directions, MAX_BYTES // max(1, count * size * tried.products.element_size()))
    enough = MIN_DRAWS if budget.rtol is None else 2 * MIN_DRAWS  # how many there will be is a guess
    if planned < enough or directions <= PILOT_DRAWS or not tried.spread > 0:
        return None
    if not _left_by_others(tried.products) ** (directions / (PILOT_DRAWS - 1)) < WORTH:
        return None
    few = pilot(space, _directions(tried.products))
    advance(PILOT_DRAWS)
    if not few.spread < NO_WORSE * tried.spread:
        return None
    sketch = [tried.products]
    for ids in chunks(directions - PILOT_DRAWS, space.size):
        sketch.append(space.rows(space.product(space.signs(len(ids)))))
        advance(len(ids))
    basis = _directions(torch.cat(sketch))
    exact = [k.clone() for k in known]
    for ids in chunks(basis.shape[2], space.size):
        vectors = space.tensors(basis[:, :, ids.start : ids.stop].permute(2, 0, 1))
        found = space.values(space.product(vectors), vectors)
        exact = [total + part.sum(0) for total, part in zip(exact, found, strict=True)]
        advance(len(ids))
    return lambda number: space.draw(number, basis), exact, 2 * directions


def _planned(tried: Pilot, known: Sequence[Tensor], budget: Budget) -> int:
    """How many plain draws there would be, about."""
    if budget.rtol is None:
        return budget.num_draws
    total = [v.mean(0) + k for v, k in zip(tried.values, known, strict=True)]
    one = relative_error(total, [v.std(0) for v in tried.values])
    return max(budget.num_draws, int(min(budget.max_draws, (one / budget.rtol) ** 2)))


def _left_by_others(products: Tensor) -> float:
    """The part of products (K, N, D) outside of the directions of the others, in squares.

    Far steadier than the spread of as many draws, since each product is held against itself.

    Source: Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation",
    which leaves out one product at a time likewise.
    """
    left = 0.0
    for k, own in enumerate(products.split(1)):
        others = torch.cat([products[:k], products[k + 1 :]])
        left += float(_projected(own, _directions(others)).double().square().sum())
    return left / max(float(products.double().square().sum()), 1e-300)


def _directions(products: Tensor) -> Tensor:
    """An orthonormal basis of products (K, N, D), sample by sample: shape (N, D, k)."""
    basis: Tensor = torch.linalg.qr(products.permute(1, 2, 0))[0]
    return basis


def _projected(vectors: Tensor, basis: Tensor) -> Tensor:
    """Vectors (K, N, D) without their parts in a basis (N, D, k), taken off twice for rounding's sake."""
    v = vectors.permute(1, 2, 0)
    for _ in range(2):
        v = v - basis @ (basis.mT @ v)
    return v.permute(2, 0, 1)
