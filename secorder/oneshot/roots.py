"""Roots of a per-sample Hessian in the model's output, as maps that make some columns, or a mixture of all of them.

H_n = Σ_k sign[n, k] u_k u_kᵀ. A matrix of outputs by outputs is never formed for it: what is asked of a root takes as
many copies of the outputs as there are columns asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

#: A linear map of coefficients (M, N or 1, K) to cotangents (M, N, C).
Map = Callable[[Tensor], Tensor]


@dataclass
class Pairs:
    """K pairs of cotangents on the model's output, sample by sample."""

    u: Tensor  #: shape ``(K, N, C)``, C the elements of one sample's output (all output tensors together)
    v: Tensor | None = None  #: the same; None means ``u`` times ``sign``
    sign: Tensor | None = None  #: shape ``(K, N)``; None means one


class Columns(Protocol):
    """Pairs of cotangents that are made when they are asked for."""

    @property
    def num_columns(self) -> int:
        """How many there are."""

    def columns(self, ids: range) -> Pairs:
        """Some of them."""

    def mixture(self, generator: torch.Generator) -> Tensor:
        """A random combination of what they are made of, shape (1, N, C)."""


@dataclass(frozen=True, eq=False)
class Root:
    """The root of a per-sample Hessian: H_n = Σ_k u_k v_kᵀ."""

    left: Map  #: coefficients ξ → Σ_k ξ_k u_k
    num_columns: int  #: K
    like: Tensor  #: a tensor with samples in dim 0, of the dtype and on the device of the cotangents
    right: Map | None = None  #: coefficients → Σ_k ξ_k v_k; None means that v_k is u_k times its sign
    sign: Tensor | None = None  #: shape ``(N, K)``; None means one
    diagonal: Tensor | None = None  #: H's own, shape ``(N, C)``, where it is known without a product
    #: shape ``(C,)``: outputs with different numbers do not interact; -1 where H is zero. None if not known.
    blocks: Tensor | None = None
    #: makes the columns' ``‖u_k‖²``, shape ``(N, K)``; None where they are not known
    weights: Callable[[], Tensor] | None = None

    def columns(self, ids: range) -> Pairs:
        """Some of the pairs."""
        basis = self.like.new_zeros(len(ids), 1, self.num_columns)
        basis[range(len(ids)), 0, list(ids)] = 1
        sign = None if self.sign is None else self.sign.T[ids.start : ids.stop].to(self.like.dtype)
        return Pairs(self.left(basis), None if self.right is None else self.right(basis), sign)

    def mixed(self, coefficients: Tensor) -> Pairs:
        """Σ_k ξ_k u_k and Σ_k ξ_k v_k for coefficients (M, N or 1, K)."""
        signed = self.right is not None or self.sign is not None
        return Pairs(self.left(coefficients), self.other(coefficients) if signed else None)

    def other(self, coefficients: Tensor) -> Tensor:
        """Σ_k ξ_k v_k."""
        if self.right is not None:
            return self.right(coefficients)
        return self.left(coefficients if self.sign is None else coefficients * self.sign)

    def mixture(self, generator: torch.Generator) -> Tensor:
        """Σ_k ξ_k u_k for random ξ, the same for all samples; of one column, the column."""
        if self.num_columns == 1:
            return self.columns(range(1)).u
        size, device = self.num_columns, generator.device
        return self.left(torch.randn(1, 1, size, generator=generator, dtype=torch.float64, device=device).to(self.like))


@dataclass(frozen=True, eq=False)
class Draws:
    """All columns mixed by random signs, drawn anew for each sample and draw: an unbiased estimate of H_n."""

    root: Root  #: of which
    seeds: list[int]  #: one for each draw
    device: torch.device  #: where signs are drawn
    without: Tensor | None = None  #: columns of each sample that are left out, shape ``(N, J)``

    @classmethod
    def of(cls, root: Root, count: int, generator: torch.Generator, without: Tensor | None = None) -> "Draws":
        """So many draws, which do not depend on how many are made at a time."""
        seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device).tolist()
        return cls(root, seeds, generator.device, without)

    @property
    def num_columns(self) -> int:
        return len(self.seeds)

    def columns(self, ids: range) -> Pairs:
        like, shape = self.root.like, (len(self.root.like), self.root.num_columns)
        signs = like.new_empty(len(ids), *shape)
        for row, index in zip(signs, ids, strict=True):
            generator = torch.Generator(device=self.device).manual_seed(self.seeds[index])
            row.copy_(torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device=self.device))
        signs.mul_(2).sub_(1).mul_(len(self.seeds) ** -0.5)  # so that squares add up to their mean
        if self.without is not None:
            signs.scatter_(2, self.without.expand(len(signs), -1, -1), 0.0)
        return self.root.mixed(signs)

    def mixture(self, generator: torch.Generator) -> Tensor:
        return self.columns(range(1)).u if self.num_columns == 1 else self.root.mixture(generator)


@dataclass(frozen=True, eq=False)
class First:
    """Some of the columns, to see how long they take."""

    whole: Columns  #: all of them
    num_columns: int  #: how many of them

    def columns(self, ids: range) -> Pairs:
        return self.whole.columns(ids)

    def mixture(self, generator: torch.Generator) -> Tensor:
        return self.whole.mixture(generator)


@dataclass(frozen=True, eq=False)
class Single:
    """One pair of a cotangent (N, C) with itself."""

    u: Tensor  #: the cotangent
    num_columns: int = 1  #: 1

    def columns(self, ids: range) -> Pairs:
        return Pairs(self.u[None])

    def mixture(self, generator: torch.Generator) -> Tensor:
        return self.u[None]


def from_hessian(hessian: Tensor) -> Root:
    """The pairs ``(e_c, H e_c)`` of a per-sample Hessian (N, C, C): differentiable, and right in every entry."""
    count, size = hessian.shape[:2]

    def left(coefficients: Tensor) -> Tensor:
        return coefficients.expand(-1, count, -1)

    return Root(left, size, hessian, lambda xi: torch.einsum("mnk,nkc->mnc", left(xi), hessian))


def joined(parts: Sequence[tuple[Root, Tensor]], like: Tensor, total: int) -> Root:
    """One root of several, each with the indices of its outputs among all of one sample's."""
    sizes = [root.num_columns for root, _ in parts]

    def placed(values: Tensor, where: Tensor) -> Tensor:
        return values.new_zeros(*values.shape[:-1], total).index_copy(-1, where, values)

    def by_part(maps: Sequence[Map]) -> Map:
        def mapped(coefficients: Tensor) -> Tensor:
            result = None
            for own, xi, (_, where) in zip(maps, coefficients.split(sizes, -1), parts, strict=True):
                piece = placed(own(xi), where)
                result = piece if result is None else result.add_(piece)
            assert result is not None
            return result

        return mapped

    right = sign = diagonal = blocks = None
    if any(root.right is not None for root, _ in parts):
        right = by_part([root.other for root, _ in parts])
    elif any(root.sign is not None for root, _ in parts):
        ones = like.new_ones(len(like), 1)
        sign = torch.cat(
            [ones.expand(-1, k) if r.sign is None else r.sign for k, (r, _) in zip(sizes, parts, strict=True)], 1
        )
    known = [(r.diagonal, r.blocks, where) for r, where in parts if r.diagonal is not None and r.blocks is not None]
    if len(known) == len(parts):
        diagonal, blocks, start = like.new_zeros(len(like), total), torch.full((total,), -1, device=like.device), 0
        for d, own, where in known:
            diagonal.index_copy_(1, where, d)
            blocks.index_copy_(0, where, torch.where(own < 0, own, own + start))
            start += int(own.max()) + 1
    weights = None
    if all(root.weights is not None for root, _ in parts):

        def weights() -> Tensor:
            return torch.cat([root.weights() for root, _ in parts if root.weights is not None], 1)

    return Root(by_part([root.left for root, _ in parts]), sum(sizes), like, right, sign, diagonal, blocks, weights)
