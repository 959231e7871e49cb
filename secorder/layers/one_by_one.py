"""The factors of several layers, multiplied layer by layer; small operations are done for all layers in one call.

What is told of a layer are its squares or their sums, which are formed once, whatever is asked.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch.host_copy import at_hand
from .._torch.several import add_each, multiply_each, square_each
from .dtypes import MANY_TERMS, added_up
from .rank_one import FactorNorms, RankOne


class Vectors(NamedTuple):
    """The random vectors that one parameter is audited with in one backward."""

    r: Tensor  #: normal, one a row of the block
    s: Tensor  #: normal, one a column; of a convolution, zero but for some input channels at one place of the kernel
    start: int  #: the first row of the block
    rows: int  #: rows of the parameter
    channel: int = 0  #: the first of these input channels
    place: int = 0  #: that place of the kernel, as places are counted in memory

    @property
    def whole(self) -> bool:
        """Whether the block is all of the parameter."""
        return self.r.shape[0] == self.rows


class OneByOne:
    """Several layers' factors of one batch, of one dtype on one device.

    Without norms of the factors squares are formed, as :meth:`add_to` needs them.
    """

    def __init__(self, layers: Sequence[RankOne], norms: Sequence[FactorNorms] | None = None) -> None:
        self._layers = layers
        self._goods: Tensor | None = None
        if norms is None:
            squares, count = square_each([x.inputs for x in layers] + [x.cotangents for x in layers]), len(layers)
            self._squares = squares[:count], squares[count:]
        else:
            self._squares = [], []
            self._rows = torch.stack([x.inputs for x in norms] + [x.cotangents for x in norms]).square_()

    @cached_property
    def _sizes(self) -> Sequence[Tensor]:
        """The sums of the squares of each layer's inputs, then of each one's cotangents."""
        of_a, of_g = self._squares
        return [x.sum() for x in of_a + of_g] if of_a else self._rows.sum(1).unbind()

    def finite(self) -> Tensor | None:
        """Of each layer, whether all squares are finite; where they are not, :meth:`add_to` adds nothing of it.

        None where all are, as far as the host knows without waiting.
        """
        numbers = at_hand(self._sizes)
        if numbers is not None and isfinite(sum(numbers)):
            return None
        both = torch.stack(list(self._sizes)).view(2, -1).sum(0)
        self._goods = (both - both) == 0
        return self._goods

    def explained(self, vectors: Sequence[Vectors | None], with_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Of each layer that is looked at rᵀ (Σ_n g_n a_nᵀ) s, with a bias as for an input of one more.

        And the square of what its rounding is relative to, the norms of both factors, of the rows that are looked at.
        Of each layer ``vectors`` are those that it is looked at with, if it is, and ``with_bias`` is one or zero.
        """
        lefts, rights, parts, here = [], [], {}, []
        ones, squares = with_bias.unbind(), self._squares[1]
        for i, (one, own) in enumerate(zip(self._layers, vectors, strict=True)):
            if own is None:
                continue
            here.append(i)
            (a, g), (r, s, start) = one.factors, own[:3]
            if r.shape[0] != g.shape[1]:
                g = g.narrow(1, start, r.shape[0])
                parts[i] = (squares[i].narrow(1, start, r.shape[0]) if squares else g.square()).sum()
            lefts.append(torch.mv(g, r))
            rights.append(torch.addmv(ones[i], a, s))
        of_inputs = torch.stack([self._sizes[i] for i in here])  # an index made of a list would be waited for
        of_cotangents = torch.stack([parts.get(i, self._sizes[len(ones) + i]) for i in here])
        if len(here) < len(ones):
            with_bias = torch.stack([ones[i] for i in here])
        left, right = torch.stack(lefts), torch.stack(rights)
        sizes = torch.add(of_inputs, with_bias, alpha=right.shape[1]).mul_(of_cotangents)
        if right.shape[1] <= MANY_TERMS:
            return torch.linalg.vecdot(left, right), sizes
        values, rounds = added_up(left.mul_(right), 1)
        return values, sizes.mul_(rounds)

    def add_to(self, outs: Sequence[Mapping[str, Tensor]], *, beta: float, alpha: float) -> None:
        """``out ← beta · out + alpha · Σ_n (g_n a_nᵀ)²``: Σ_n g_n² (a_n²)ᵀ of weights, and Σ_n g_n² of biases.

        The outs are 1-D, by the parameters' names. Overwrites the squares.
        """
        of_a, of_g = self._squares
        if self._goods is not None:
            for squares in (*of_a, *of_g):
                squares.nan_to_num_()  # times zero, where it does not count
            multiply_each(of_g, self._goods.to(of_g[0].dtype).unbind())
        biases = [(own["bias"], g.sum(0)) for own, g in zip(outs, of_g, strict=True) if "bias" in own]
        if biases:
            add_each(*zip(*biases, strict=True), beta=beta, alpha=alpha)
        for own, a, g in zip(outs, of_a, of_g, strict=True):
            own["weight"].view(-1, a.shape[1]).addmm_(g.t(), a, beta=beta, alpha=alpha)
