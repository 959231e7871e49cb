"""The contraction with factors in bfloat16 and sums in float32, for devices whose matrix units are faster in it.

*One position.* The entry of a weight's diagonal is ``Σ_n g_n² a_n²``, a sum of positive terms. Squares are formed in
float32 and rounded to bfloat16, whose unit roundoff is u = 2⁻⁸. Rounding to nearest changes a factor by at most
u / (1 + u), relative, so that a term changes by at most::

    (1 + u / (1 + u))² − 1 = 2 u − u² (1 + 2 u) / (1 + u)² < 2 u − u² + u⁴ ,

and so does the sum, since all terms are positive: there is nothing to cancel. Products of two bfloat16 numbers are
exact in float32; rounding the squares and the sums of N terms adds at most (N + 4) 2⁻²⁴. Since u² = 2⁻¹⁶, every entry
is right to a relative error of 2 u = 2⁻⁷ for batches of up to 250 samples, and of 2⁻⁷ + (N − 250) 2⁻²⁴ beyond; where
squares neither overflow nor underflow in float32, whose range bfloat16 has.

*Positions.* The per-sample gradient ``Σ_p g_p a_pᵀ`` is formed as training forms the weight's own gradient in this
precision, from factors in bfloat16 and rounded to it; it may cancel, and there is no bound relative to an entry, but
with factors that come in bfloat16 it is rounded once. Squares and their sums are in float32.

*Norms of several positions* (:mod:`.norms`) are sums of products of products: factors are rounded, as training rounds
them for its own, and all else is in float32. With factors that come in bfloat16 nothing is rounded at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .._torch.vjp import chunks
from .contraction import added, contract_sum, kept
from .patches import Patches, product_in_float32, whole_input
from .per_sample import ACCELERATOR_CHUNK_ELEMENTS, Outer, PerSample

__all__ = ["contract_sum_low"]

#: Of the factors of matrix products: as the layer computes where that is faster, or always this.
Precision = Literal["auto", "float32", "bfloat16"]

LOW = torch.bfloat16


def is_low(precision: Precision, device: torch.device, computed_in: torch.dtype | None) -> bool:
    """Whether factors are rounded, by what was asked and the dtype that the layer computes in (perhaps autocast's)."""
    if precision == "auto":
        return device.type != "cpu" and computed_in in (torch.bfloat16, torch.float16)
    return precision == "bfloat16"


def rounded(part: Outer) -> Outer:
    """A weight's, of several positions, with factors in bfloat16; any other as it is."""
    if part.a is None or part.g.shape[2] == 1 or part.g.dtype is not torch.float32:
        return part
    a = replace(part.a, image=part.a.image.to(LOW)) if isinstance(part.a, Patches) else part.a.to(LOW)
    return Outer(a, part.g.to(LOW))


def contraction(low: bool) -> Callable[..., Tensor]:
    """The contraction of squares, by matrix products of factors as they are or, with ``low``, in bfloat16."""
    return contract_sum_low if low else contract_sum


def contract_sum_low(
    parts: Sequence[PerSample],
    *,
    numel: int,
    out: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """:func:`~secorder.layers.contraction.contract_sum` of squares with matrix products of factors in bfloat16.

    Args:
        parts: each layer's per-sample gradients of the parameter; in other forms than one outer product of float32
            they are contracted as they are.
        numel: number of the parameter's elements.
        out, beta, alpha, keep: as for :func:`~secorder.layers.contraction.contract`.

    Returns:
        1-D tensor of ``numel`` elements, in float32.

    Example:
        >>> import torch
        >>> from secorder.layers.contraction import contract
        >>> from secorder.layers.low_precision import contract_sum_low
        >>> from secorder.layers.per_sample import Outer
        >>> part = Outer(torch.randn(8, 1, 1, 3), torch.randn(8, 1, 1, 2))
        >>> torch.allclose(contract_sum_low([part], numel=6), contract(part, numel=6), rtol=2**-7)
        True
    """
    part = parts[0]
    if len(parts) > 1 or not isinstance(part, Outer) or part.a is None or part.g.dtype is not torch.float32:
        return contract_sum(parts, numel=numel, out=out, beta=beta, alpha=alpha, keep=keep)
    if part.g.shape[2] == 1:
        return added(kept(_one_position(part).reshape(numel), keep), out, beta, alpha)
    if out is not None and beta == 0.0 and alpha == 1.0 and keep is None:
        return _positions(part, out)
    return added(kept(_positions(part, part.g.new_empty(numel)), keep), out, beta, alpha)


def _one_position(part: Outer) -> Tensor:
    """Σ_n g_n² (a_n²)ᵀ by groups, ``(groups, out, in)``."""
    assert part.a is not None
    g, a = part.g.squeeze(2).transpose(0, 1), whole_input(part.a).squeeze(2).transpose(0, 1)
    return product_in_float32((g * g).to(LOW).transpose(1, 2), (a * a).to(LOW))


def _positions(part: Outer, out: Tensor) -> Tensor:
    """Write Σ_n (Σ_p g_{n,p} a_{n,p}ᵀ)² to ``out``, in pieces of a few samples' gradients, each passed over once."""
    assert part.a is not None
    count, groups, positions, width = part.g.shape
    fan_in = part.a.shape[-1]
    total = out.view(groups, width, fan_in)
    if not count:
        return out.zero_()
    for n in chunks(count, max(1, ACCELERATOR_CHUNK_ELEMENTS // (groups * (width + positions) * fan_in))):
        rows = slice(n.start, n.stop)
        left = part.g[rows].to(LOW).flatten(0, 1).transpose(1, 2)
        formed = torch.bmm(left, part.a[rows].to(LOW).flatten(0, 1)).unflatten(0, (-1, groups))
        if n.start == 0:
            torch.linalg.vector_norm(formed, dim=0, dtype=torch.float32, out=total).square_()
        else:
            total.add_(torch.linalg.vector_norm(formed, dim=0, dtype=torch.float32).square_())
    return out
