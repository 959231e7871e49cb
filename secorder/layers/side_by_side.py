"""The factors of several small layers side by side in one matrix: apart, each costs the calls of many operations.

A block of columns for the inputs of each layer, and then one for the cotangents of each: what is asked of every layer
is one operation on all columns, or a product with a matrix that tells the blocks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.several import add_each, multiply_each

__all__ = ["Frame", "SideBySide", "frame_of"]


class Frame(NamedTuple):
    """Which columns are whose, and the random vectors that the audit looks at the layers with.

    Attributes:
        widths: of the blocks.
        owners: shape ``(columns, layers)``, one where a column is a layer's.
        blocks: shape ``(columns, 2 · layers)``, one where a column is in a block.
        random: the same with random numbers in place of ones.
        with_bias: shape ``(layers,)``, one where a layer has a bias, else zero.
    """

    widths: list[int]
    owners: Tensor
    blocks: Tensor
    random: Tensor
    with_bias: Tensor


def frame_of(vectors: Sequence[tuple[Tensor, Tensor]], with_bias: Tensor) -> Frame:
    """The frame of layers.

    Args:
        vectors: of each, random numbers for its outputs and its inputs.
        with_bias: as of :class:`Frame`.
    """
    parts = [s for _, s in vectors] + [r for r, _ in vectors]
    blocks = torch.block_diag(*[torch.ones_like(part)[:, None] for part in parts])
    random = torch.block_diag(*[part[:, None] for part in parts])
    of_inputs, of_cotangents = blocks.chunk(2, 1)
    return Frame([len(part) for part in parts], of_inputs + of_cotangents, blocks, random, with_bias)


class SideBySide:
    """Several layers' factors of one batch.

    Args:
        frame: of the layers.
        factors: of each layer the inputs ``(N, in)`` and the cotangents ``(N, out)``.
    """

    def __init__(self, frame: Frame, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._frame = frame
        self._columns = torch.cat([a for a, _ in factors] + [g for _, g in factors], 1)
        self._squares = self._columns * self._columns
        self._sums = self._squares.sum(0)

    def finite(self) -> Tensor:
        """Of each layer, whether all squares are finite; where they are not, they are zero from now on."""
        owners = self._frame.owners
        bad = (self._sums - self._sums) != 0
        goods = torch.mv(owners.t(), bad.to(owners.dtype)) == 0
        self._columns.nan_to_num_(0.0, 0.0, 0.0).mul_(torch.mv(owners, goods.to(owners.dtype)))
        torch.mul(self._columns, self._columns, out=self._squares)
        self._sums = self._squares.sum(0)
        return goods

    def explained(self) -> tuple[Tensor, Tensor]:
        """Of each layer rᵀ (Σ_n g_n a_nᵀ) s, with a bias as for an input of one more; and what rounding is relative to.

        The square of the latter: of each factor's norm and that of its product with random numbers.
        """
        blocks, with_bias = self._frame.blocks, self._frame.with_bias
        products = torch.mm(self._columns, self._frame.random)
        count, layers = len(products), len(with_bias)
        products[:, :layers] += with_bias
        sizes = torch.mv(blocks.t(), self._sums) + (products * products).sum(0)
        sizes[:layers].add_(with_bias, alpha=count)
        right, left = products.chunk(2, 1)
        of_inputs, of_cotangents = sizes.chunk(2)
        return (left * right).sum(0), of_cotangents * of_inputs

    def norms(self) -> Tensor:
        """‖∂ℓ_n/∂θ‖² = ‖g_n‖² (‖a_n‖² + 1), the one of the bias, shape ``(layers, N)``."""
        of_a, of_g = torch.mm(self._squares, self._frame.blocks).t().chunk(2)
        return torch.addcmul(self._frame.with_bias[:, None] * of_g, of_g, of_a)

    def add_to(self, outs: Sequence[Mapping[str, Tensor]], *, beta: float, alpha: float) -> None:
        """``out ← beta · out + alpha · Σ_n (g_n a_nᵀ)²`` and, of biases, alpha · Σ_n g_n².

        Args:
            outs: of each layer the sums by the parameters' names, 1-D.
            beta: factor of what they held.
            alpha: factor of what is added.
        """
        widths, layers = self._frame.widths, len(outs)
        of_g = self._sums.split(widths)[layers:]
        biases = [(own["bias"], part) for own, part in zip(outs, of_g, strict=True) if "bias" in own]
        if biases:
            totals, found = zip(*biases, strict=True)
            if beta != 1.0:
                multiply_each(totals, beta)
            add_each(totals, found, alpha=alpha)
        blocks = self._squares.split(widths, 1)
        for own, a, g in zip(outs, blocks, blocks[layers:], strict=False):
            own["weight"].view(-1, a.shape[1]).addmm_(g.t(), a, beta=beta, alpha=alpha)
