"""Columns of a root of the output Hessian, too many to be pulled back: the heaviest ones, and draws of the others."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ...results import Strategy
from ..heaviest import by_weight
from ..measurement import Measurement
from ..recorded_layer import contract_pairs, unsettled
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


def run(
    task: Measurement,
    side: OutputSide,
    graphs: Sequence[LayerGraph],
    budget: Budget,
    seconds: float,
    reduce: Reduce,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Estimate]:
    """Of each layer the Gauss-Newton part, which is all there is where the model is piecewise linear after it."""
    rest = unsettled(task, side.model_outputs, graphs, by_graph=side.by_graph)
    assert not rest, "columns are drawn where that was known when they were chosen"
    root = side.find_root(task.chunk_size)

    def contract(some: Columns) -> list[list[Tensor]]:
        found = contract_pairs(task, side.model_outputs, graphs, some)
        return [reduced(reduce, parts or ()) for parts in found]

    def counted(count: int) -> None:
        for graph in graphs:
            graph.num_hvps += count
        advance(count)

    return by_weight(root, budget, contract, task.generator, counted, seconds)
