"""Columns of a root of the output Hessian, too many to be pulled back: the heaviest ones, and draws of the others."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ...results import Strategy
from ..heaviest import by_weight
from ..measurement import Measurement
from ..recorded_layer import contract_settled, in_dim_zero, layouts_by_graph
from ..roots import Columns
from . import columns
from .budget import Budget
from .estimate import Estimate
from .facts import Facts
from .layer_graph import LayerGraph, OutputSide
from .output_draws import Reduce, reduced

NAME = Strategy.COLUMN_DRAWS


def applies(facts: Facts) -> bool:
    """Where columns do, and are known to be multiplied with a Jacobian: of draws, no sum shows it."""
    return columns.applies(facts) and facts.columns_drawn and not facts.last


def products(facts: Facts, budget: Budget) -> int:
    """One for each draw, or column, for all layers together."""
    return min(budget.num_draws, facts.num_columns)


def settled(task: Measurement, side: OutputSide, graphs: Sequence[LayerGraph]) -> bool:
    """Whether it is known, without a look at numbers, that pulled back cotangents are Jᵀ times them, by sample.

    Where samples are is entered into the layers.
    """
    if side.by_graph and not layouts_by_graph(side.model_outputs, graphs):
        return True
    if task.certain:
        in_dim_zero(graphs)
    return task.certain


def run(
    task: Measurement,
    side: OutputSide,
    graphs: Sequence[LayerGraph],
    budget: Budget,
    reduce: Reduce,
    advance: Callable[[int], None],
    seconds: float = math.inf,
) -> list[Estimate]:
    """Of each layer the Gauss-Newton part, which is all there is where the model is piecewise linear after it."""
    known = settled(task, side, graphs)
    assert known, "columns are drawn where that was known when they were chosen"
    root = side.find_root(task.chunk_size)

    def contract(some: Columns) -> list[list[Tensor]]:
        found = contract_settled(task, side.model_outputs, graphs, some)
        return [reduced(reduce, parts or ()) for parts in found]

    def counted(count: int) -> None:
        for graph in graphs:
            graph.num_hvps += count
        advance(count)

    return by_weight(root, budget, contract, task.generator, counted, seconds)
