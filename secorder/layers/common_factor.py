"""Squares of several parameters' per-sample gradients, of which some are products with one factor in common.

Such as those of a recurrent layer's two weights, which the same gradients on the gates reach: side by side, their other
factors make one product, in half as many calls and of larger matrices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .contraction import contract
from .per_sample import Outer, PerSample


def contract_each(parts: Sequence[PerSample], outs: Sequence[Tensor]) -> None:
    """Write Σ_n u_n² of each per-sample gradient to its ``out``, as :func:`~.contraction.contract` does."""
    alike: dict[int, list[tuple[Outer, Tensor, Tensor]]] = {}
    for part, out in zip(parts, outs, strict=True):
        if isinstance(part, Outer) and isinstance(part.a, Tensor) and part.g.shape[1] == 1:
            alike.setdefault(id(part.g), []).append((part, part.a, out))
        else:
            contract(part, numel=out.numel(), out=out, beta=0.0)
    for group in alike.values():
        if len(group) == 1:
            ((part, _, out),) = group
            contract(part, numel=out.numel(), out=out, beta=0.0)
        else:
            _contract_together(*zip(*group, strict=True))


def _contract_together(parts: Sequence[Outer], inputs: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Those of one and the same cotangents: as inputs, so that the product's rows are one parameter's after another."""
    g = parts[0].g
    product = contract(Outer(g, torch.cat(list(inputs), 3)), numel=sum([out.numel() for out in outs]))
    rows = product.view(-1, g.shape[3]).split([a.shape[3] for a in inputs])
    for own, out in zip(rows, outs, strict=True):
        out.view(g.shape[3], -1).copy_(own.t())
