"""From each sample's Hessian in a layer's z to the diagonal in its parameters."""

from dataclasses import replace

from torch import Tensor

from ..._torch.vjp import chunks
from ...layers.contraction import contract, contract_basis
from ...layers.layout import DIM_ZERO
from ...layers.per_sample import Outer
from ..recorded_layer import parts_of_one
from ..timing import Pieces
from .layer_graph import LayerGraph

__all__ = ["by_basis", "by_diagonal", "by_diagonal_alone"]

#: Memory of the rows of the basis that are contracted at a time.
CHUNK_BYTES = 1 << 25


def by_diagonal_alone(graph: LayerGraph) -> bool:
    """Whether each element of z has parameters of its own, so that the diagonal of H_z gives that of θ."""
    graph.layouts = [DIM_ZERO]
    leaf = graph.leaves[0]
    if leaf.dim() != 2:
        return False
    parts = graph.gradients([leaf.detach()[None]])
    return all(
        isinstance(part, Outer) and part.g.shape[-2] == 1 and part.g.shape[-1] * part.g.shape[-3] == leaf.shape[1]
        for part in parts.values()
    )


def by_diagonal(graph: LayerGraph, diagonal: Tensor) -> list[Tensor]:
    """By the diagonal (N, size) of H_z, of a layer for which that suffices."""
    like = graph.leaves[0]
    u = graph.gradients([diagonal.view(1, *like.shape)])
    v = graph.gradients([like.new_ones(()).expand(1, *like.shape)])
    totals = parts_of_one(graph.layer)
    for total, (name, p) in zip(totals, graph.layer.parameters.items(), strict=True):
        contract(u[name], v[name], numel=p.numel(), out=total, beta=0.0)
    return totals


def by_basis(graph: LayerGraph, matrix: Tensor, here: slice, pieces: Pieces = chunks) -> list[Tensor]:
    """By the basis of z, of some samples."""
    size, shape = matrix.shape[1], graph.leaves[0].shape[1:]
    part = replace(graph, inputs=[tuple(x[here] for x in call) for call in graph.inputs])
    totals = None
    for ids in pieces(size, max(1, CHUNK_BYTES // (4 * matrix[:, 0].numel() * matrix.element_size()))):
        rows = matrix[:, :, ids.start : ids.stop].permute(2, 0, 1).reshape(len(ids), len(matrix), *shape)
        basis = matrix.new_zeros(len(ids), 1, size)
        basis[range(len(ids)), 0, list(ids)] = 1
        vectors = basis.expand(-1, len(matrix), -1).reshape(len(ids), len(matrix), *shape)
        u, v = part.gradients([rows]), part.gradients([vectors])
        found = [contract_basis(u[name], v[name], numel=p.numel()) for name, p in graph.layer.parameters.items()]
        totals = found if totals is None else [a + b for a, b in zip(totals, found, strict=True)]
    assert totals is not None
    return totals
