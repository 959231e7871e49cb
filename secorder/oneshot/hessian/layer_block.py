"""From each sample's Hessian in a layer's z to the diagonal in its parameters."""

from dataclasses import replace

import torch
from torch import Tensor

from ..._torch.vjp import chunks
from ...layers.contraction import contract_basis, contract_one_position
from ...layers.layout import DIM_ZERO
from ...layers.per_sample import Outer
from ..recorded_layer import parts_of_one
from ..timing import Pieces
from .layer_graph import LayerGraph

#: Memory of the rows of the basis that are contracted at a time.
CHUNK_BYTES = 1 << 25


def by_diagonal_alone(graph: LayerGraph) -> bool:
    """Whether each element of z has parameters of its own, so that the diagonal of H_z gives that of θ.

    It has, where the factor of a cotangent is the cotangent as it is, at one position: shown by one of which no two
    elements are alike.
    """
    graph.layouts = [DIM_ZERO]
    leaf = graph.leaves[0]
    if leaf.dim() != 2:
        return False
    count, size = leaf.shape
    cotangent = torch.arange(1, size + 1, dtype=leaf.dtype, device=leaf.device).sqrt_().expand(count, -1)
    parts = graph.gradient([cotangent]).values()
    return all(
        isinstance(part, Outer) and part.g.shape[-2] == 1 and torch.equal(part.g.flatten(1), cotangent)
        for part in parts
    )


def by_diagonal(graph: LayerGraph, diagonal: Tensor) -> list[Tensor]:
    """By the diagonal (N, size) of H_z, of a layer for which that suffices: Σ_n diag(H_z)_n ⊙ a_n²."""
    parts, totals = graph.gradient([diagonal.view(graph.leaves[0].shape)]), parts_of_one(graph.layer)
    for total, name in zip(totals, graph.layer.parameters, strict=True):
        part = parts[name]
        assert isinstance(part, Outer)
        contract_one_position(part.a, part.g[:, :, 0], total.numel(), total, 0.0)
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
