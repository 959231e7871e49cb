"""Each sample's Hessian in one tensor, and what it is before a matrix product or a function of each element."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block"]


@dataclass
class Block:
    """Each sample's Hessian in one tensor: Σ_k u_k v_kᵀ + diag(d), or a matrix, or of that the diagonal alone.

    Attributes:
        u: shape (N, K, size).
        v: the same.
        d: shape (N, size); None for zero.
        matrix: shape (N, size, size), in place of the others.
        only: shape (N, size), the diagonal, in place of the others.
    """

    u: Tensor | None = None
    v: Tensor | None = None
    d: Tensor | None = None
    matrix: Tensor | None = None
    only: Tensor | None = None

    def diagonal(self) -> Tensor:
        """Shape (N, size)."""
        if self.only is not None:
            return self.only
        if self.matrix is not None:
            return self.matrix.diagonal(dim1=1, dim2=2)
        assert self.u is not None
        assert self.v is not None
        total = (self.u * self.v).sum(1)
        return total if self.d is None else total + self.d

    def full(self) -> Tensor:
        """Shape (N, size, size)."""
        if self.matrix is not None:
            return self.matrix
        assert self.u is not None
        assert self.v is not None
        total = self.u.transpose(1, 2) @ self.v
        return total if self.d is None else total + torch.diag_embed(self.d)

    def times(self, vectors: Tensor) -> Tensor:
        """H v for stacked v, (k, N, size)."""
        if self.matrix is not None:
            return torch.einsum("nij,knj->kni", self.matrix, vectors)
        assert self.u is not None
        assert self.v is not None
        found = torch.einsum("nci,knc->kni", self.u, torch.einsum("nci,kni->knc", self.v, vectors))
        return found if self.d is None else found + self.d * vectors

    def before_matrix(self, weight: Tensor, *, diagonal: bool) -> "Block":
        """That before a product with ``weight`` (in, out): Wᵀ H W."""
        back = weight.t()
        if self.matrix is not None:
            product = self.matrix @ back
            if diagonal:
                return Block(only=(product * back).sum(1))
            return Block(matrix=weight @ product)
        assert self.u is not None
        assert self.v is not None
        u = self.u @ back
        v = u if self.v is self.u else self.v @ back
        if diagonal:
            only = (u * v).sum(1)
            return Block(only=only if self.d is None else only + self.d @ (back * back))
        if self.d is None:
            return Block(u, v)
        matrix = ((weight * self.d[:, None]).flatten(0, 1) @ back).unflatten(0, (len(u), -1))
        return Block(matrix=matrix.baddbmm_(u.transpose(1, 2), v))

    def before_elementwise(self, first: Tensor, second: Tensor | None) -> "Block":
        """That before a function of each element: D H D + diag(φ″ ∘ g)."""
        if self.only is not None:
            only = self.only * first * first
            return Block(only=only if second is None else only + second)
        if self.matrix is not None:
            matrix = self.matrix.mul_(first[:, None]).mul_(first[:, :, None])  # formed here, and used nowhere else
            if second is not None:
                matrix.diagonal(dim1=1, dim2=2).add_(second)
            return Block(matrix=matrix)
        assert self.u is not None
        assert self.v is not None
        u = self.u * first[:, None]
        v = u if self.v is self.u else self.v * first[:, None]
        d = None if self.d is None else self.d * first * first
        return Block(u, v, second if d is None else d if second is None else d + second)

    def rows(self, here: slice) -> "Block":
        """Of some samples."""
        u = None if self.u is None else self.u[here]
        v = u if self.v is self.u else None if self.v is None else self.v[here]
        return Block(u, v, None if self.d is None else self.d[here])
