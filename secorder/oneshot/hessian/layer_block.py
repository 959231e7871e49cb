"""From each sample's Hessian in a layer's z to the diagonal in its parameters."""

from dataclasses import replace

import torch
from torch import Tensor

from ..._torch.vjp import chunks
from ...layers.basis import contract_basis
from ...layers.contraction import contract, contract_one_position
from ...layers.dtypes import zeros
from ...layers.layout import DIM_ZERO
from ...layers.patches import Patches
from ...layers.per_sample import Outer, total_gradient
from ..recorded_layer import parts_of_one
from ..timing import Pieces
from .block import Block
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


def by_block(graph: LayerGraph, block: Block, here: slice, pieces: Pieces = chunks) -> list[Tensor]:
    """By all of H_z of some samples: by its columns and its diagonal where that takes less, else by the basis of z."""
    part = replace(graph, inputs=[tuple(x[here] for x in call) for call in graph.inputs], layouts=[DIM_ZERO])
    shape = graph.leaves[0][here].shape
    columns = block.u is not None and block.rows is None and _columns_pay(part, block.u, shape)
    return _by_columns(part, block, shape, pieces) if columns else _by_basis(part, block.full(), shape, pieces)


def _columns_pay(part: LayerGraph, u: Tensor, shape: torch.Size) -> bool:
    """Whether each element of z has one factor of the layer's input, so that columns do, and how much they take."""
    size, fan_in = u.shape[2], 1
    cotangent = torch.arange(1, size + 1, dtype=u.dtype, device=u.device).sqrt_().expand(len(u), -1)
    for found in part.gradient([cotangent.reshape(shape)]).values():
        if not isinstance(found, Outer) or not torch.equal(found.g.flatten(1).sort(1).values, cotangent):
            return False
        fan_in = max(fan_in, 1 if found.a is None else found.a.shape[-1])
        positions = found.g.shape[2]
    columns = u.shape[1]
    return 2 * columns * fan_in <= size * (columns + positions * fan_in)


def _by_columns(part: LayerGraph, block: Block, shape: torch.Size, pieces: Pieces) -> list[Tensor]:
    """Σ_k w_k (Jᵀu_k) ⊙ (Jᵀv_k), and of the diagonal d, at each position one factor alone: Σ_p d_p a_p²."""
    totals, parameters = zeros(part.layer), list(part.layer.parameters.items())
    assert block.u is not None
    assert block.v is not None
    for ids in pieces(block.u.shape[1], max(1, CHUNK_BYTES // (4 * block.u[:, 0].numel() * block.u.element_size()))):
        some = slice(ids.start, ids.stop)
        alike = block.v is block.u and block.w is None
        weighted = block.v[:, some] if block.w is None else block.v[:, some] * block.w[:, some, None]
        columns = [block.u[:, some]] if alike else [block.u[:, some], weighted]
        found = [part.gradients([x.transpose(0, 1).reshape(len(ids), *shape)]) for x in columns]
        for total, (name, p) in zip(totals, parameters, strict=True):
            contract(*(gradients[name] for gradients in found), numel=p.numel(), out=total)
    diagonal = {} if block.d is None else part.gradient([block.d.reshape(shape)])
    for total, (name, p) in zip(totals, parameters, strict=True):
        if diagonal:
            part_of_d = diagonal[name]
            assert isinstance(part_of_d, Outer)
            total += total_gradient(Outer(_squared(part_of_d.a), part_of_d.g), p.numel())
    return totals


def _squared(a: Tensor | Patches | None) -> Tensor | Patches | None:
    if isinstance(a, Patches):
        return replace(a, image=a.image.square())
    return None if a is None else a.square()


def _by_basis(part: LayerGraph, matrix: Tensor, shape: torch.Size, pieces: Pieces) -> list[Tensor]:
    size, totals = matrix.shape[1], zeros(part.layer)
    for ids in pieces(size, max(1, CHUNK_BYTES // (4 * matrix[:, 0].numel() * matrix.element_size()))):
        rows = matrix[:, :, ids.start : ids.stop].permute(2, 0, 1).reshape(len(ids), *shape)
        basis = matrix.new_zeros(len(ids), 1, size)
        basis[range(len(ids)), 0, list(ids)] = 1
        vectors = basis.expand(-1, len(matrix), -1).reshape(len(ids), *shape)
        u, v = part.gradients([rows]), part.gradients([vectors])
        for total, (name, p) in zip(totals, part.layer.parameters.items(), strict=True):
            total += contract_basis(u[name], v[name], numel=p.numel())
    return totals
