"""The factors of several small layers as columns of one matrix, so that one operation serves all of them.

A block of columns for the inputs of each layer, then one for the cotangents of each, and a column of ones, the input of
biases: what is asked of every layer is one operation on all columns, or a product with a matrix that tells the blocks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.several import add_each
from .dtypes import MANY_TERMS, added_up


class Frame(NamedTuple):
    """Which columns are whose, and the random vectors that the audit looks at the layers with."""

    widths: list[int]  #: of the blocks
    owners: Tensor  #: shape ``(layers, columns)``, one where a column is a layer's; the last one, of ones, is nobody's
    owned: Tensor  #: the same transposed
    #: shape ``(columns, 2 · layers)``, one where a column is in a block; the last one is in those of inputs of a layer
    #: with a bias
    blocks: Tensor
    random: Tensor  #: the same with random numbers in place of ones, but for the last column


def frame_of(vectors: Sequence[tuple[Tensor, Tensor]], with_bias: Tensor) -> Frame:
    """The frame of layers, by random numbers for the outputs and the inputs of each, and which of them have a bias."""
    parts = [s for _, s in vectors] + [r for r, _ in vectors]
    last = torch.cat([with_bias, torch.zeros_like(with_bias)])[None]
    blocks = torch.block_diag(*[torch.ones_like(part)[:, None] for part in parts])
    random = torch.block_diag(*[part[:, None] for part in parts])
    owners = torch.cat([blocks, torch.zeros_like(last)]).t().unflatten(0, (2, -1)).sum(0)
    return Frame([*map(len, parts), 1], owners, owners.t(), torch.cat([blocks, last]), torch.cat([random, last]))


def columns_of(factors: Sequence[tuple[Tensor, Tensor]], out: Tensor | None = None) -> Tensor:
    """The factors of layers, of each the inputs ``(N, in)`` and the cotangents ``(N, out)``, side by side, and ones."""
    first, _ = factors[0]
    ones = first.new_ones(first.shape[0], 1)
    return torch.cat([a for a, _ in factors] + [g for _, g in factors] + [ones], 1, out=out)


class SideBySide:
    """Several layers' factors of one batch, or of several that are added at once.

    Columns are what :func:`columns_of` makes of each batch, shape ``(batches, N, columns)``.
    """

    def __init__(self, frame: Frame, columns: Tensor) -> None:
        self._frame, self._columns = frame, columns
        self._squares = columns * columns
        self._sums = self._squares.sum(1)
        self._goods: Tensor | None = None
        self._bad: Tensor | None = None  # columns of layers of which a square is not finite

    def finite(self) -> Tensor:
        """Of each batch and layer, whether all squares are finite; where they are not, they are zero from now on."""
        zeros = (self._sums - self._sums).nan_to_num_(1.0)  # of what is finite
        found = torch.mm(zeros, self._frame.owned)
        self._goods = found == 0
        self._bad = torch.mm(found, self._frame.owners) != 0
        self._squares.masked_fill_(self._bad[:, None], 0.0)
        self._sums.masked_fill_(self._bad, 0.0)
        return self._goods

    def explained(self) -> tuple[Tensor, Tensor]:
        """Of one batch, of each layer rᵀ (Σ_n g_n a_nᵀ) s, with a bias as for an input of one more.

        Not finite where it is not. And the square of what its rounding is relative to, the norms of both factors.
        """
        columns, sums = self._columns[0], self._sums[0]
        if self._bad is not None:  # zeros of other layers do not hide them
            columns.masked_fill_(self._bad, 0.0)
        right, left = torch.mm(columns, self._frame.random).chunk(2, 1)
        of_inputs, of_cotangents = torch.mv(self._frame.blocks.t(), sums).chunk(2)
        sizes = of_cotangents * of_inputs
        if len(left) > MANY_TERMS:
            values, rounds = added_up(left * right)
            sizes.mul_(rounds)
        else:
            values = (left * right).sum(0)
        return values if self._goods is None else values.div_(self._goods[0]), sizes

    def add_to(self, outs: Sequence[Mapping[str, Tensor]], *, beta: float, alpha: float) -> None:
        """``out ← beta · out + alpha · Σ_n (g_n a_nᵀ)²`` and, of biases, alpha · Σ_n g_n²; 1-D, by parameter."""
        widths, layers = self._frame.widths, len(outs)
        of_g = self._sums.sum(0).split_with_sizes(widths)[layers:-1]
        biases = [(own["bias"], part) for own, part in zip(outs, of_g, strict=True) if "bias" in own]
        if biases:
            add_each(*zip(*biases, strict=True), beta=beta, alpha=alpha)
        blocks = self._squares.flatten(0, 1).split_with_sizes(widths, 1)
        for own, a, g in zip(outs, blocks, blocks[layers:], strict=False):
            own["weight"].view(-1, a.shape[1]).addmm_(g.t(), a, beta=beta, alpha=alpha)
