"""Unbiased estimates from random signs on every sample's z."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._torch.vjp import default_chunk_size, stacked_vjp
from ...layers.contraction import contract
from ...layers.dtypes import zeros
from ...layers.per_sample import PerSample, with_cotangents
from ...results import Strategy
from ..measurement import Measurement
from .budget import Budget
from .estimate import Draw, Estimate, average
from .facts import Facts
from .layer_graph import LayerGraph

__all__ = ["NAME", "Reduce", "applies", "draws", "products", "run"]

NAME = Strategy.OUTPUT_DRAWS

#: What is estimated, made of draws of the diagonal by parameter.
Reduce = Callable[[list[Tensor]], list[Tensor]]

#: Draws that decide whether the part that columns do not give is easier to estimate than the whole.
_PILOT = 4


def applies(facts: Facts) -> bool:
    """Where parameters act through z alone and samples do not interact after it."""
    return bool(facts.own_use and facts.samples_independent and facts.outputs)


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
    exact: Sequence[Tensor] = (),
    seconds: float = math.inf,
) -> tuple[Strategy, Estimate]:
    """An estimate; of what columns do not give alone, where they gave the rest and that pays.

    Args:
        task: the measurement.
        graph: of the layer; its layouts tell where samples are.
        budget: how many draws, or how exact.
        elements: numbers that one product keeps.
        advance: of the progress bar.
        reduce: of draws of the diagonal, what is wanted.
        exact: what columns gave, reduced: the generalised Gauss-Newton part; or nothing.
        seconds: that it may take, where an error is asked for.
    """
    size = default_chunk_size(elements, graph.leaves[0], task.chunk_size)
    whole = draws(task, graph, graph.output_gradients, reduce)
    if exact and graph.residual and budget.num_draws > 2 * _PILOT:
        rest = draws(task, graph, graph.residual, reduce)
        pilots = whole(_PILOT), rest(_PILOT)
        if sum(v.var(0).sum() for v in pilots[1]) < sum(v.var(0).sum() for v in pilots[0]):
            found = average(rest, [torch.zeros_like(v) for v in exact], budget, size, advance, exact, seconds)
            return Strategy.COLUMNS_AND_OUTPUT_DRAWS, found
    like = [v[0] for v in reduce([z[None] for z in zeros(graph.layer)])]
    return NAME, average(whole, like, budget, size, advance, seconds=seconds)


def draws(task: Measurement, graph: LayerGraph, output_gradients: Sequence[Tensor | None], reduce: Reduce) -> Draw:
    """Draws of the diagonal, or of what is made of it."""

    def draw(count: int) -> list[Tensor]:
        vectors = task.signs(count, graph.leaves)
        u, v = graph.gradients(stacked_vjp(output_gradients, graph.leaves, vectors)), graph.gradients(vectors)
        return reduce(
            [
                torch.stack([contract(_pick(u[name], k), _pick(v[name], k), numel=p.numel()) for k in range(count)])
                for name, p in graph.layer.parameters.items()
            ]
        )

    return draw


def _pick(gradient: PerSample, index: int) -> PerSample:
    return with_cotangents(gradient, lambda g: g[index])
