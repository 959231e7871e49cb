"""Exact diagonals by the basis of one sample's z, all samples at once, call by call."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..._torch.vjp import chunks, stacked_vjp
from ...layers.basis import contract_basis
from ...layers.dtypes import zeros
from ...layers.layout import DIM_ZERO, Layout
from ...results import Strategy
from ..measurement import Measurement
from .budget import Budget
from .facts import Facts
from .layer_graph import LayerGraph

NAME = Strategy.OUTPUT_BASIS


def applies(facts: Facts) -> bool:
    """Where parameters act through z alone and samples do not interact after it."""
    return bool(facts.own_use and facts.samples_independent and facts.outputs)


def products(facts: Facts, budget: Budget) -> int:
    """One for each element of one sample's z."""
    return facts.outputs


def seconds(facts: Facts) -> float:
    """What a product takes; 0 where none was timed."""
    return facts.seconds


def run(
    task: Measurement, graph: LayerGraph, elements: int, advance: Callable[[int], None], limit: int | None = None
) -> list[Tensor]:
    """The diagonal, by parameter; of ``limit`` products only, to see how long they last."""
    totals: list[Tensor] = zeros(graph.layer)
    size = task.products_at_once(elements, graph.leaves[0])
    for call, basis_size in enumerate(graph.sizes if limit is None else [min(limit, graph.sizes[0])]):
        for ids in chunks(basis_size, size):
            vectors = [leaf.new_zeros(()).expand(len(ids), *leaf.shape) for leaf in graph.leaves]
            vectors[call] = _basis(graph.leaves[call], graph.layouts[call], ids)
            found = stacked_vjp(graph.output_gradients, graph.leaves, vectors, create_graph=task.create_graph)
            u, v = graph.gradients(found), graph.gradients(vectors)
            for index, (name, p) in enumerate(graph.layer.parameters.items()):
                totals[index] = totals[index] + contract_basis(u[name], v[name], numel=p.numel())
            del vectors, found, u, v  # before there are the next
            advance(len(ids))
    return totals


def _basis(leaf: Tensor, layout: Layout, ids: range) -> Tensor:
    """Basis vectors ``ids`` of one sample's output, the same for every sample, shape ``(K, *leaf.shape)``."""
    split = layout.split(leaf.detach())
    rest = split.shape[1:]
    flat = leaf.new_zeros(len(ids), rest.numel())
    flat[range(len(ids)), list(ids)] = 1
    vectors = flat.view(len(ids), 1, *rest).expand(-1, split.shape[0], *rest)
    return vectors if layout == DIM_ZERO else torch.stack([layout.join(v) for v in vectors])
