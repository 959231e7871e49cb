"""Unbiased estimates from random signs on every sample's z."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._torch.vjp import stacked_vjp
from ...layers.contraction import contract
from ...layers.dtypes import compute_dtype, zeros
from ...layers.per_sample import PerSample, with_cotangents
from ...results import Strategy
from ..measurement import Measurement
from .budget import Budget
from .deflation import PILOT_DRAWS, Pilot, Space, deflated, may_pay, pilot
from .estimate import Draw, Estimate, average
from .facts import Facts
from .layer_graph import LayerGraph
from .output_basis import applies as applies  # where a basis of z does

NAME = Strategy.OUTPUT_DRAWS

#: What is estimated, made of draws of the diagonal by parameter.
Reduce = Callable[[list[Tensor]], list[Tensor]]


def reduced(reduce: Reduce, diagonal: Sequence[Tensor]) -> list[Tensor]:
    """What is estimated, made of one diagonal."""
    return [v[0] for v in reduce([part.detach().flatten()[None] for part in diagonal])]


def whole(values: list[Tensor]) -> list[Tensor]:
    """The diagonals themselves."""
    return values


def products(facts: Facts, budget: Budget) -> int:
    """One for each draw."""
    return budget.num_draws


def run(
    task: Measurement,
    graph: LayerGraph,
    budget: Budget,
    elements: int,
    advance: Callable[[int], None],
    reduce: Reduce,
    exact: Estimate | None = None,
    seconds: float = math.inf,
) -> tuple[Strategy, Estimate]:
    """An estimate; of what columns do not give alone, where they gave the rest and that pays.

    A few products tell what is easiest to estimate, and whether to take directions of each sample exactly first.
    ``exact`` is what columns gave, reduced: the generalised Gauss-Newton part, which may be an estimate; or nothing.
    """
    size = task.products_at_once(elements, graph.leaves[0])
    space = space_of(task, graph, graph.output_gradients, reduce, size)
    strategy, known = NAME, reduced(reduce, zeros(graph.layer))
    draw: Draw = space.draw
    spent = 0
    errors: list[Tensor] = []
    if (exact and budget.num_draws > 2 * PILOT_DRAWS) or may_pay(budget):
        tried = pilot(space)
        if exact and graph.residual:
            rest = space_of(task, graph, graph.residual, reduce, size)
            other = pilot(rest)
            if _easier(other, tried, exact, budget.num_draws):
                space, tried, strategy, known = rest, other, Strategy.COLUMNS_AND_OUTPUT_DRAWS, exact.values
                errors = exact.errors
        draw = space.draw
        found = deflated(space, tried, known, budget, advance)
        if found is not None:
            draw, known, spent = found
    how = budget.fewer(spent).closer(0.86 if errors else 1.0)  # with half of it, an error of less than the whole
    estimate = average(draw, [torch.zeros_like(v) for v in known], how, size, advance, known, seconds)
    return strategy, estimate.beside(errors, budget) if errors else estimate


def _easier(rest: Pilot, whole: Pilot, known: Estimate, count: int) -> bool:
    """Whether the rest, besides what is known, has less of an error than the whole."""
    if not known.errors:
        return rest.spread < whole.spread
    wide = torch.float64
    variances = [sum(float(v.var(0).sum(dtype=wide)) for v in tried.values) / count for tried in (rest, whole)]
    return variances[0] + sum(float(e.square().sum(dtype=wide)) for e in known.errors) < variances[1]


def space_of(
    task: Measurement, graph: LayerGraph, output_gradients: Sequence[Tensor | None], reduce: Reduce, size: int
) -> Space:
    """Vectors on z, and products with ∂²L/∂z², or with the part of it whose gradients are given."""
    sizes = graph.sizes
    kind = compute_dtype(graph.layer)

    def rows(vectors: Sequence[Tensor]) -> Tensor:
        parts = [
            torch.stack([layout.split(v).flatten(1) for v in stacked])
            for stacked, layout in zip(vectors, graph.layouts, strict=True)
        ]
        return torch.cat(parts, 2).to(kind)

    def tensors(stacked: Tensor) -> list[Tensor]:
        found = []
        for part, leaf, layout in zip(stacked.split(sizes, 2), graph.leaves, graph.layouts, strict=True):
            shape = layout.split(leaf).shape
            found.append(torch.stack([layout.join(v.reshape(shape)) for v in part]).to(leaf.dtype))
        return found

    def values(products: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        u, v = graph.gradients(products), graph.gradients(vectors)
        count = len(vectors[0])
        return reduce(
            [
                torch.stack([contract(_pick(u[name], k), _pick(v[name], k), numel=p.numel()) for k in range(count)])
                for name, p in graph.layer.parameters.items()
            ]
        )

    return Space(
        lambda count: task.signs(count, graph.leaves),
        lambda vectors: stacked_vjp(output_gradients, graph.leaves, vectors),
        values,
        rows,
        tensors,
        size,
    )


def _pick(gradient: PerSample, index: int) -> PerSample:
    return with_cotangents(gradient, lambda g: g[index])
