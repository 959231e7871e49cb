"""Each sample's Hessian in one tensor, pulled back through a matrix product or an elementwise function."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Block", "Memory"]


@dataclass
class Memory:
    """Memory that is used over and over: the system takes longer to give a fresh page than numbers to fill it with.

    Attributes:
        pieces: flat tensors.
    """

    pieces: list[Tensor] = field(default_factory=list)

    def room(self, like: Tensor, *shape: int, beside: tuple[Tensor | None, ...] = ()) -> Tensor:
        """A tensor of a shape, with anything in it, that has nothing in common with those that are in use still.

        Args:
            like: a tensor of the dtype and on the device.
            shape: its shape.
            beside: the tensors in use, besides ``like``.
        """
        size = torch.Size(shape).numel()
        used = {t.untyped_storage().data_ptr() for t in (like, *beside) if t is not None}
        free = [k for k, t in enumerate(self.pieces) if t.untyped_storage().data_ptr() not in used]
        large = next((k for k in free if self.pieces[k].numel() >= size), None)
        if large is None:
            if free:
                del self.pieces[free[0]]
            large = len(self.pieces)
            self.pieces.append(like.new_empty(size))
        return self.pieces[large][:size].view(shape)


@dataclass
class Block:
    """Each sample's Hessian in one tensor: Σ_k u_k v_kᵀ + diag(d), or a matrix, or of that the diagonal alone.

    What comes before a step lies in ``memory``, where the next steps overwrite it.

    Attributes:
        u: shape (N, K, size).
        v: the same.
        d: shape (N, size); None for zero.
        matrix: shape (size, N, size), in place of the others: so matrices multiply all samples at once from both sides.
        only: shape (N, size), the diagonal, in place of the others.
        memory: for what is computed.
    """

    u: Tensor | None = None
    v: Tensor | None = None
    d: Tensor | None = None
    matrix: Tensor | None = None
    only: Tensor | None = None
    memory: Memory = field(default_factory=Memory)

    def diagonal(self) -> Tensor:
        """Shape (N, size)."""
        if self.only is not None:
            return self.only
        if self.matrix is not None:
            return self.matrix.diagonal(dim1=0, dim2=2)
        u, v = self._factors()
        total = torch.mul(u, v, out=self.memory.room(u, *u.shape, beside=(v,))).sum(1)
        return total if self.d is None else total.add_(self.d)

    def full(self) -> Tensor:
        """Shape (N, size, size)."""
        if self.matrix is not None:
            return self.matrix.transpose(0, 1)
        u, v = self._factors()
        total = u.transpose(1, 2) @ v
        return total if self.d is None else total + torch.diag_embed(self.d)

    def times(self, vectors: Tensor) -> Tensor:
        """H v for stacked v, (k, N, size)."""
        if self.matrix is not None:
            return torch.einsum("inj,knj->kni", self.matrix, vectors)
        u, v = self._factors()
        found = torch.einsum("nci,knc->kni", u, torch.einsum("nci,kni->knc", v, vectors))
        return found if self.d is None else found + self.d * vectors

    def before_matrix(self, weight: Tensor, *, diagonal: bool) -> "Block":
        """That before a product with ``weight`` (in, out): Wᵀ H W."""
        back = weight.t()
        if self.matrix is not None:
            product = self._rows_times(self.matrix, back)
            if diagonal:
                return Block(only=product.mul_(back[:, None]).sum(0), memory=self.memory)
            return Block(matrix=self._times_rows(weight, product), memory=self.memory)
        u, v = self._factors()
        first = self._rows_times(u, back, v)
        second = first if v is u else self._rows_times(v, back, first)
        if diagonal:
            only = first.mul_(second).sum(1)
            return Block(only=only if self.d is None else only.addmm_(self.d, back * back), memory=self.memory)
        if self.d is None:
            return Block(first, second, memory=self.memory)
        width, (count, size) = len(weight), self.d.shape
        inside = self.memory.room(weight, width, count, size, beside=(first, second))
        matrix = self._rows_times(torch.mul(weight[:, None], self.d, out=inside), back, first, second)
        room = self.memory.room(matrix, count, width, width, beside=(first, second))
        matrix.add_(torch.bmm(first.transpose(1, 2), second, out=room).transpose(0, 1))
        return Block(matrix=matrix, memory=self.memory)

    def before_elementwise(self, first: Tensor, second: Tensor | None) -> "Block":
        """That before a function of each element: D H D + diag(φ″ ∘ g)."""
        if self.only is not None:
            only = self.only * first * first
            return Block(only=only if second is None else only.add_(second), memory=self.memory)
        if self.matrix is not None:
            matrix = self.matrix.mul_(first).mul_(first.t()[:, :, None])  # formed here, and used nowhere else
            if second is not None:
                matrix.diagonal(dim1=0, dim2=2).add_(second)
            return Block(matrix=matrix, memory=self.memory)
        u, v = self._factors()
        left = torch.mul(u, first[:, None], out=self.memory.room(u, *u.shape, beside=(v,)))
        right = left
        if v is not u:
            right = torch.mul(v, first[:, None], out=self.memory.room(v, *v.shape, beside=(u, left)))
        d = None if self.d is None else self.d * first * first
        return Block(left, right, second if d is None else d if second is None else d + second, memory=self.memory)

    def rows(self, here: slice) -> "Block":
        """Of some samples."""
        u = None if self.u is None else self.u[here]
        v = u if self.v is self.u else None if self.v is None else self.v[here]
        return Block(u, v, None if self.d is None else self.d[here], memory=self.memory)

    def _factors(self) -> tuple[Tensor, Tensor]:
        assert self.u is not None
        assert self.v is not None
        return self.u, self.v

    def _rows_times(self, x: Tensor, matrix: Tensor, *beside: Tensor) -> Tensor:
        """x (a, b, k) times a matrix (k, l), beside which others are in use."""
        room = self.memory.room(x, *x.shape[:2], matrix.shape[1], beside=beside)
        torch.mm(x.flatten(0, 1), matrix, out=room.flatten(0, 1))
        return room

    def _times_rows(self, matrix: Tensor, x: Tensor) -> Tensor:
        """A matrix (l, k) times x (k, a, b)."""
        room = self.memory.room(x, len(matrix), *x.shape[1:])
        torch.mm(matrix, x.flatten(1), out=room.flatten(1))
        return room
