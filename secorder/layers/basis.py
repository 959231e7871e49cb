"""The contraction where one of each pair of cotangents is a basis vector: a row of the parameter, in place of all."""

import torch
from torch import Tensor

from .contraction import contract
from .patches import whole_input
from .per_sample import Outer, PerSample, chunk_elements


def contract_basis(u: PerSample, v: PerSample, *, numel: int) -> Tensor:
    """:func:`~.contraction.contract` of K stacked pairs where every v is a basis vector of the layer's output.

    Where the parameter's factor of a basis vector is one element again, at (group, position p, row o), only that row of
    the parameter is touched: ``Σ_n (Σ_q u[n, q, o] a[n, q]) ⊙ a[n, p]``, ``out`` times less work. Of an Outer v, one
    row of the sample dimension will do.
    """
    if not (isinstance(u, Outer) and isinstance(v, Outer)):
        return contract(u, v, numel=numel)
    count, (groups, positions, width) = u.g.shape[0], v.g.shape[-3:]
    a = u.g.new_ones(()).expand(u.g.shape[1], groups, positions, 1) if u.a is None else whole_input(u.a)
    factors = v.g[:, 0].reshape(count, -1)
    if not bool(((factors != 0).sum(1) == 1).all()):
        return contract(u, Outer(u.a, v.g.expand_as(u.g)), numel=numel)
    index = factors.abs().argmax(1)
    scale = factors.gather(1, index[:, None])  # (K, 1)
    group, position, column = index // (positions * width), index // width % positions, index % width
    if positions == 1:  # only the diagonal of each sample's block is asked for, and squares of the input
        rows = u.g[torch.arange(count, device=index.device), :, group, 0, column] * scale
        diagonal = a.new_zeros(groups * width, a.shape[0]).index_add(0, group * width + column, rows)
        squares = (a * a).squeeze(2).transpose(0, 1)
        return torch.bmm(diagonal.view(groups, width, -1), squares).reshape(numel)
    total = a.new_zeros(groups * width, a.shape[-1])
    few = max(1, chunk_elements(a.device) // max(1, a[:, 0].numel()))
    for chunk in torch.arange(count, device=index.device).split(few):
        g, p, o = group[chunk], position[chunk], column[chunk]
        inputs = a.transpose(0, 1)[g]  # (k, N, P, in)
        weights = u.g[chunk, :, g, :, o]  # (k, N, P)
        here = inputs.gather(2, p.view(-1, 1, 1, 1).expand(-1, inputs.shape[1], 1, inputs.shape[-1])).squeeze(2)
        rows = ((weights.unsqueeze(2) @ inputs).squeeze(2) * here).sum(1) * scale[chunk]
        total = total.index_add(0, g * width + o, rows)
    return total.reshape(numel)
