"""Each sample's Hessian in one tensor, pulled back through a matrix product or an elementwise function."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..._torch.onednn import multiplied_by_onednn, product_by_onednn


@dataclass
class Memory:
    """Memory that is used over and over: the system takes longer to give a fresh page than numbers to fill it with."""

    pieces: list[Tensor] = field(default_factory=list)  #: flat tensors

    def room(self, like: Tensor, *shape: int, beside: tuple[Tensor | None, ...] = ()) -> Tensor:
        """A tensor of a shape, with anything in it, without memory in common with ``like`` and others in use."""
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
    """Each sample's Hessian in one tensor: Σ_k w_k u_k v_kᵀ + Σ_j s_j r_j r_jᵀ + diag(d), or a matrix, or its diagonal.

    What comes before a step lies in ``memory``, where the next steps overwrite it; some overwrite what they start from.
    """

    u: Tensor | None = None  #: shape (N, K, size)
    v: Tensor | None = None  #: the same
    w: Tensor | None = None  #: shape (N, K); None for ones
    d: Tensor | None = None  #: shape (N, size); None for zero
    #: r, the same for all samples, shape (J, size), of which s, shape (N, J), are the weights; None for no such sum
    rows: tuple[Tensor, Tensor] | None = None
    #: shape (size, N, size), in place of the others: so matrices multiply all samples at once from both sides
    matrix: Tensor | None = None
    only: Tensor | None = None  #: shape (N, size), the diagonal, in place of the others
    memory: Memory = field(default_factory=Memory)  #: for what is computed
    formed: bool = False  #: whether ``u`` and ``v`` lie there

    def diagonal(self) -> Tensor:
        """Shape (N, size)."""
        if self.only is not None:
            return self.only
        if self.matrix is not None:
            return self.matrix.diagonal(dim1=0, dim2=2)
        u, v = self._columns()
        total = self._weighted(torch.mul(u, v, out=self.memory.room(u, *u.shape, beside=(v,))))
        if self.rows is not None:
            total.addmm_(self.rows[1], self.rows[0].square())
        return total if self.d is None else total.add_(self.d)

    def full(self) -> Tensor:
        """Shape (N, size, size)."""
        if self.matrix is not None:
            return self.matrix.transpose(0, 1)
        u, v = self._columns()
        total = u.transpose(1, 2) @ (v if self.w is None else v * self.w[..., None])
        if self.rows is not None:
            rows, weights = self.rows
            total = total + rows.t() @ (rows * weights[..., None])
        return total if self.d is None else total + torch.diag_embed(self.d)

    def times(self, vectors: Tensor) -> Tensor:
        """H v for stacked v, (k, N, size)."""
        if self.matrix is not None:
            return torch.einsum("inj,knj->kni", self.matrix, vectors)
        u, v = self._columns()
        inner = torch.einsum("nci,kni->knc", v, vectors)
        found = torch.einsum("nci,knc->kni", u, inner if self.w is None else inner * self.w)
        if self.rows is not None:
            found = found + (vectors @ self.rows[0].t() * self.rows[1]) @ self.rows[0]
        return found if self.d is None else found + self.d * vectors

    def before_matrix(self, weight: Tensor, *, diagonal: bool, factored: bool = False) -> "Block":
        """That before a product with ``weight`` (in, out): Wᵀ H W; ``factored``, d becomes rows."""
        back = weight.t()
        if self.matrix is not None:
            product = self._rows_times(self.matrix, back)
            if diagonal:
                return Block(only=product.mul_(back[:, None]).sum(0), memory=self.memory)
            return Block(matrix=self._times_rows(weight, product), memory=self.memory)
        u, v = self._columns()
        first = self._rows_times(u, back, v)
        second = first if v is u else self._rows_times(v, back, first)
        if diagonal:
            only = self._weighted(first.mul_(second))
            if self.rows is not None:
                only.addmm_(self.rows[1], (self.rows[0] @ back).square_())
            return Block(only=only if self.d is None else only.addmm_(self.d, back * back), memory=self.memory)
        parts = [] if self.rows is None else [(self.rows[0] @ back, self.rows[1])]
        parts += [] if self.d is None else [(back, self.d)]
        rows = (torch.cat([r for r, _ in parts]), torch.cat([s for _, s in parts], 1)) if parts else None
        if rows is None or factored:
            return Block(first, second, self.w, rows=rows, memory=self.memory, formed=True)
        return Block(matrix=self._matrix(first, second, *rows), memory=self.memory)

    def _matrix(self, first: Tensor, second: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """That of columns and rows."""
        count, size = len(first), rows.shape[1]
        inside = self.memory.room(first, size, *weights.shape, beside=(second,))
        torch.mul(rows.t()[:, None], weights, out=inside)
        matrix = self._rows_times(inside, rows, first, second)
        room = self.memory.room(matrix, count, size, size, beside=(first, second))
        second = second if self.w is None else second * self.w[..., None]
        return matrix.add_(torch.bmm(first.transpose(1, 2), second, out=room).transpose(0, 1))

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
        u, v = self._columns()
        left = self._scaled(u, first, v)
        right = left if v is u else self._scaled(v, first, left)
        w = self.w
        if self.rows is not None:  # from here on, they are another for each sample: columns like others
            ones = self.rows[1].new_ones(()).expand(u.shape[:2])
            w = torch.cat([ones if w is None else w, self.rows[1]], 1)
        d = None if self.d is None else self.d * first * first
        d = second if d is None else d if second is None else d + second
        return Block(left, right, w, d, memory=self.memory, formed=True)

    def of_samples(self, here: slice) -> "Block":
        """Of some samples."""
        u = None if self.u is None else self.u[here]
        v = u if self.v is self.u else None if self.v is None else self.v[here]
        w, d = (None if x is None else x[here] for x in (self.w, self.d))
        return Block(u, v, w, d, memory=self.memory)

    def _columns(self) -> tuple[Tensor, Tensor]:
        assert self.u is not None
        assert self.v is not None
        return self.u, self.v

    def _weighted(self, products: Tensor) -> Tensor:
        """Σ_k w_k of what is a vector a column."""
        return products.sum(1) if self.w is None else torch.bmm(self.w[:, None], products)[:, 0]

    def _scaled(self, columns: Tensor, first: Tensor, *beside: Tensor) -> Tensor:
        """Columns and rows times φ′, in place where that may be."""
        if self.rows is None:
            room = columns if self.formed else self.memory.room(columns, *columns.shape, beside=beside)
            return torch.mul(columns, first[:, None], out=room)
        (count, number, size), rows = columns.shape, self.rows[0]
        room = self.memory.room(columns, count, number + len(rows), size, beside=beside)
        torch.mul(columns, first[:, None], out=room[:, :number])
        torch.mul(rows, first[:, None], out=room[:, number:])
        return room

    def _rows_times(self, x: Tensor, matrix: Tensor, *beside: Tensor) -> Tensor:
        """x (a, b, k) times a matrix (k, l), beside which others are in use."""
        if multiplied_by_onednn(x, x.numel() * matrix.shape[1]):  # twice as fast, in memory of its own
            return product_by_onednn(x.flatten(0, 1), matrix).view(*x.shape[:2], -1)
        room = self.memory.room(x, *x.shape[:2], matrix.shape[1], beside=beside)
        torch.mm(x.flatten(0, 1), matrix, out=room.flatten(0, 1))
        return room

    def _times_rows(self, matrix: Tensor, x: Tensor) -> Tensor:
        """A matrix (l, k) times x (k, a, b)."""
        if multiplied_by_onednn(x, x.numel() * len(matrix)):
            return product_by_onednn(matrix, x.flatten(1)).view(-1, *x.shape[1:])
        room = self.memory.room(x, len(matrix), *x.shape[1:])
        torch.mm(matrix, x.flatten(1), out=room.flatten(1))
        return room
