"""Timing a few products of each layer, where it matters which strategy is taken."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..._torch.vjp import default_chunk_size
from ...layers.layout import DIM_ZERO
from ...layers.selection import Layer
from ...results import Strategy
from ..measurement import Measurement
from ..output_root import output_root
from ..recorded_layer import contract_pairs, layout_options
from ..roots import First
from ..timing import TRIAL_SECONDS, seconds_of, seconds_per_product
from . import column_draws, columns, output_basis, output_draws, parameter_basis, parameter_draws
from .budget import Budget
from .choice import Choice, cheapest, choose
from .estimate import Estimate
from .facts import Facts
from .investigate import Findings, verify_samples
from .layer_graph import LayerGraph, OutputSide
from .on_parameters import on_parameters

__all__ = ["learn_seconds", "matters"]

#: Draws whose spread tells how many there will be, at most.
PILOT_DRAWS = 16

#: Forwards that a Hessian-vector product takes as long as, about.
FORWARDS = 5


def matters(found: Findings, budget: Budget) -> bool:
    """Whether there is so much to do that the choice may depend on how long a product takes."""
    chosen = choose(list(found.facts.values()), budget)
    rest = [f for f in found.facts.values() if f.used and not f.last and chosen[f.layer].strategy != Strategy.CHAIN]
    products = sum(min(f.outputs or f.numel, f.numel) for f in rest)
    return products * FORWARDS * found.seconds > budget.max_seconds / 10


def learn_seconds(task: Measurement, found: Findings, budget: Budget, *, draws: bool = False) -> dict[str, float]:
    """Time a few products of every layer, and enter into the facts how long they take.

    Args:
        task: the measurement.
        found: whose facts to complete.
        budget: how exact, how expensive.
        draws: make a few draws of the layers that are to be drawn, too.

    Returns:
        by layer, the standard error of one draw relative to the diagonal, where draws were made.
    """
    chosen = choose(list(found.facts.values()), budget)
    asked = [f.layer for f in found.facts.values() if f.used and not f.last and f.numel]
    asked = [name for name in asked if chosen[name].strategy != Strategy.CHAIN]
    allowance = TRIAL_SECONDS / max(1, len(asked))
    by_columns = [found.graphs[name] for name in asked if columns.applies(found.facts[name])]
    if found.output_side is not None and by_columns:
        seconds = _of_columns(task, found.output_side, by_columns, TRIAL_SECONDS)
        for graph in by_columns:
            found.learn(graph.layer.name, seconds_by_column=seconds)
        verify_samples(task, found, budget)  # where columns take too long
    chosen = choose(list(found.facts.values()), budget)
    asked = [name for name in asked if chosen[name].strategy not in (Strategy.COLUMNS, Strategy.COLUMN_DRAWS)]
    by_parameters = []
    for name in asked:
        facts = found.facts[name]
        if cheapest(facts, budget) is output_basis:
            seconds = _in_z(task, found.graphs[name], facts, allowance)
            found.learn(name, seconds=seconds)
        else:
            by_parameters.append(next(x for x in task.layers if x.name == name))
    gradients = {}
    for layer, own in on_parameters(task, by_parameters):
        if any(g is not None for g in own):
            gradients[layer.name] = own
            seconds = _on_parameters(task, layer, own, found.facts[layer.name], allowance)
            found.learn(layer.name, seconds=seconds)
    verify_samples(task, found, budget)
    return _draw_some(task, found, budget, gradients) if draws else {}


def _draw_some(
    task: Measurement, found: Findings, budget: Budget, gradients: dict[str, list[Tensor | None]]
) -> dict[str, float]:
    """Draw as many times as tells how long it takes, and how many draws there will be."""
    few = replace(budget, num_draws=min(budget.num_draws, PILOT_DRAWS), rtol=None)
    chosen = choose(list(found.facts.values()), budget)
    drawn = [layer for layer in task.layers if chosen[layer.name].strategy == Strategy.PARAMETER_DRAWS]
    relative = _of_column_draws(task, found, few, chosen)
    gradients |= {x.name: own for x, own in on_parameters(task, [x for x in drawn if x.name not in gradients])}
    for name, choice in chosen.items():
        facts = found.facts[name]
        estimates: list[Estimate] = []
        if choice.strategy == Strategy.OUTPUT_DRAWS:
            how = few, facts.output_elements + facts.numel, _nothing, _unchanged
            work = partial(output_draws.run, task, found.graphs[name], *how)
            seconds = seconds_of(lambda: estimates.append(work()[1]))  # noqa: B023 - called at once
        elif choice.strategy == Strategy.PARAMETER_DRAWS:
            layer = next(x for x in task.layers if x.name == name)
            own = few, facts.parameter_elements, _nothing, _unchanged
            other = partial(parameter_draws.run, task, layer, gradients[name], *own)
            seconds = seconds_of(lambda: estimates.append(other()))  # noqa: B023 - called at once
        else:
            continue
        found.learn(name, seconds_by_draw=seconds / few.num_draws)
        relative[name] = estimates[0].relative_error * few.num_draws**0.5
    return relative


def _of_column_draws(task: Measurement, found: Findings, few: Budget, chosen: Mapping[str, Choice]) -> dict[str, float]:
    """A few draws of all layers that columns are drawn for together."""
    graphs = [found.graphs[name] for name, choice in chosen.items() if choice.strategy == Strategy.COLUMN_DRAWS]
    if not graphs or found.output_side is None:
        return {}
    work = partial(column_draws.run, task, found.output_side, graphs, few, _unchanged, _nothing)
    estimates: list[Estimate] = []
    seconds = seconds_of(lambda: estimates.extend(work())) / few.num_draws
    for graph in graphs:
        found.learn(graph.layer.name, seconds_by_draw=seconds / len(graphs))
    by_layer = zip(graphs, estimates, strict=True)
    return {graph.layer.name: e.relative_error * max(1, e.num_draws) ** 0.5 for graph, e in by_layer}


def _in_z(task: Measurement, graph: LayerGraph, facts: Facts, allowance: float) -> float:
    def trial(count: int) -> None:
        output_basis.run(task, graph, facts.output_elements, _nothing, count)

    size = default_chunk_size(facts.output_elements, graph.leaves[0], task.chunk_size)
    return seconds_per_product(trial, min(size, facts.outputs), allowance)


def _on_parameters(
    task: Measurement, layer: Layer, own: Sequence[Tensor | None], facts: Facts, allowance: float
) -> float:
    def trial(count: int) -> None:
        parameter_basis.run(task, layer, own, facts.parameter_elements, _nothing, count)

    like = task.isolated.replacements(layer)[0]
    size = default_chunk_size(facts.parameter_elements, like, task.chunk_size)
    return seconds_per_product(trial, min(size, facts.numel), allowance)


def _of_columns(task: Measurement, side: OutputSide, graphs: Sequence[LayerGraph], allowance: float) -> float:
    """Of one column, for all layers together."""
    side.root = side.root or output_root(side.output_gradients, side.points, task.chunk_size)
    root = side.root
    usual = [g for g in graphs if all(x == DIM_ZERO for x in next(iter(layout_options(g, task.num_samples)), [None]))]
    if not usual:
        return 0.0

    def trial(count: int) -> None:
        contract_pairs(
            side.model_outputs,
            usual,
            First(root, count),
            certain=True,
            generator=task.generator,
            chunk_size=task.chunk_size,
        )

    elements = sum(t.numel() for graph in graphs for t in graph.leaves) + sum(t.numel() for t in side.model_outputs)
    size = default_chunk_size(elements, side.model_outputs[0], task.chunk_size)
    seconds = seconds_per_product(trial, min(size, root.num_columns), allowance)
    for graph in usual:
        graph.layouts = []
    return seconds


def _unchanged(values: list[Tensor]) -> list[Tensor]:
    return values


def _nothing(_: int) -> None:
    return None
