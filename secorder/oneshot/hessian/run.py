"""Carrying out what was chosen, layer by layer: for diagonals, and for traces of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...layers.dtypes import zeros
from ...monitor.progress import progress_bar
from ...results import Strategy
from ..measurement import Measurement
from ..recording import recorded
from ..timing import seconds_of
from . import chain, column_draws, columns, output_basis, output_draws, parameter_basis, parameter_draws
from .budget import Budget
from .choice import Choice, choose, seconds_of_draws
from .decision import decide
from .estimate import Estimate
from .investigate import Findings, give_up_chain, investigate, verify_samples
from .layer_graph import LayerGraph
from .on_parameters import on_parameters
from .output_draws import Reduce, reduced
from .trials import gauss_newton_alone


@dataclass
class Outcome:
    """What became of a layer."""

    strategy: Strategy  #: by which it went
    estimate: Estimate  #: the values
    checks: dict[str, bool]  #: what was looked at before
    num_hvps: int  #: products spent on it


def carry_out(task: Measurement, budget: Budget, reduce: Reduce) -> dict[str, Outcome]:
    """Find out the facts, choose, and run; nothing here is differentiable.

    ``reduce`` makes what is wanted of a stack of diagonals by parameter, each ``(k, numel)``.
    """
    outcomes: dict[str, Outcome] = {}
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        found = investigate(task, recording, budget, columns=True)
        by_chain = decide(task, found, budget, recording)
        seconds = seconds_of(lambda: _chain(task, found, budget, reduce, outcomes))
        if outcomes:
            budget = budget.after(seconds if by_chain is None else by_chain)
            verify_samples(task, found, budget)  # of those that there is not enough time for now
        known = _columns(task, found, budget, reduce, outcomes)
        chosen = choose(found.facts.values(), budget)
        _in_z(task, found, chosen, budget, reduce, known, outcomes)
    _on_parameters(task, found, chosen, budget, reduce, outcomes)
    return {layer.name: outcomes[layer.name] for layer in task.layers}


def _chain(task: Measurement, found: Findings, budget: Budget, reduce: Reduce, outcomes: dict[str, Outcome]) -> None:
    """Finish the layers that the chain serves."""
    chosen = choose(found.facts.values(), budget)
    names = [name for name, choice in chosen.items() if choice.strategy == chain.NAME]
    if not names or found.chain is None:
        return
    try:
        carried = chain.run(task, chain.shortened(found.chain, names))
    except RuntimeError as error:
        give_up_chain(task, found, budget, names, error)
        return
    for name, values in carried.items():
        checks = found.facts[name].checks | {"samples_independent": True}
        spent = found.graphs[name].num_hvps + found.facts[name].chain_products
        outcomes[name] = Outcome(chain.NAME, Estimate(reduced(reduce, values)), checks, spent)


def _columns(
    task: Measurement, found: Findings, budget: Budget, reduce: Reduce, outcomes: dict[str, Outcome]
) -> dict[str, Estimate]:
    """Finish the layers that columns serve; returns what they give of those that are drawn."""
    side = found.output_side
    if side is None:
        return {}
    chosen = choose(found.facts.values(), budget)
    strategies = {name: choice.strategy for name, choice in chosen.items()}
    gauss_newton = set(gauss_newton_alone(found, budget))
    few = {name for name in gauss_newton if found.facts[name].num_columns <= budget.num_draws}
    served = [g for name, g in found.graphs.items() if strategies[name] == Strategy.COLUMNS or name in few]
    known = _all_columns(task, found, served, reduce)
    lost = any(strategies[g.layer.name] == Strategy.COLUMNS and g.layer.name not in known for g in served)
    many = {name for name in gauss_newton - few if found.facts[name].columns_drawn}
    drawn = [g for name, g in found.graphs.items() if strategies[name] == Strategy.COLUMN_DRAWS or name in many]
    if drawn:
        closer = budget.closer(0.5) if many else budget  # what is drawn besides has an error of its own
        seconds = len(drawn) * seconds_of_draws(budget, chosen)
        with progress_bar(
            task.progress, "Hessian by columns and draws", found.facts[drawn[0].layer.name].num_columns
        ) as bar:
            estimates = column_draws.run(task, side, drawn, closer, reduce, bar, seconds)
        known |= {graph.layer.name: estimate for graph, estimate in zip(drawn, estimates, strict=True)}
    for name in [x for x in known if strategies[x] in (Strategy.COLUMNS, Strategy.COLUMN_DRAWS)]:
        checks = found.facts[name].checks | {"outputs_by_sample": True}
        outcomes[name] = Outcome(strategies[name], known.pop(name), checks, found.graphs[name].num_hvps)
    if lost:
        verify_samples(task, found, budget)
    return known


def _all_columns(
    task: Measurement, found: Findings, served: Sequence[LayerGraph], reduce: Reduce
) -> dict[str, Estimate]:
    """What all columns give of these layers; one that they turn out not to serve is missing, and learns so."""
    assert found.output_side is not None
    before = [graph.layouts for graph in served]
    given = columns.run(task, found.output_side, served) if served else []
    known = {}
    for graph, values, layouts in zip(served, given, before, strict=True):
        name = graph.layer.name
        if values is None:
            graph.layouts = layouts  # which others go by
            found.learn(name, num_columns=0, columns_drawn=False)
        else:
            known[name] = Estimate(reduced(reduce, values))
    return known


def _in_z(
    task: Measurement,
    found: Findings,
    chosen: dict[str, Choice],
    budget: Budget,
    reduce: Reduce,
    known: dict[str, Estimate],
    outcomes: dict[str, Outcome],
) -> None:
    """The layers that go by z, on the graph that was recorded."""
    order = (output_basis.NAME, output_draws.NAME)
    todo = [name for name, choice in chosen.items() if choice.strategy in order and name not in outcomes]
    todo.sort(key=lambda name: order.index(chosen[name].strategy))
    total = sum(chosen[name].products for name in todo)
    with progress_bar(task.progress and bool(total), "Hessian in z", total) as bar:
        for name in todo:
            graph, facts = found.graphs[name], found.facts[name]
            spent: list[int] = [graph.num_hvps]
            advance = _counted(bar, spent)
            if chosen[name].strategy == output_basis.NAME:
                values = output_basis.run(task, graph, facts.output_elements, advance)
                result = output_basis.NAME, Estimate(reduced(reduce, values))
            else:
                elements = facts.output_elements + facts.numel
                seconds = seconds_of_draws(budget, chosen)
                how = budget.within(seconds, facts.seconds_by_draw), elements, advance, reduce, known.get(name), seconds
                result = output_draws.run(task, graph, *how)
            outcomes[name] = Outcome(*result, facts.checks, sum(spent))
            graph.output_gradients = graph.residual = []  # frees the graph as far as no other layer needs it


def _on_parameters(
    task: Measurement,
    found: Findings,
    chosen: dict[str, Choice],
    budget: Budget,
    reduce: Reduce,
    outcomes: dict[str, Outcome],
) -> None:
    """The layers that go by the parameters, on a graph of their own, and those that are not used."""
    for layer in task.layers:
        if layer.name not in outcomes and chosen[layer.name].strategy == Strategy.UNUSED:
            nothing = Estimate(reduced(reduce, zeros(layer)))
            outcomes[layer.name] = Outcome(Strategy.UNUSED, nothing, found.facts[layer.name].checks, 0)
    todo = [layer for layer in task.layers if layer.name not in outcomes]
    total = sum(chosen[layer.name].products for layer in todo)
    with progress_bar(task.progress and bool(total), "Hessian on parameters", total) as bar:
        for layer, own in on_parameters(task, todo):
            facts = found.facts[layer.name]
            graph = found.graphs.get(layer.name)
            spent: list[int] = [graph.num_hvps if graph else 0]
            advance = _counted(bar, spent)
            if all(g is None for g in own):
                result = Strategy.UNUSED, Estimate(reduced(reduce, zeros(layer)))
            elif chosen[layer.name].strategy == parameter_basis.NAME:
                values = parameter_basis.run(task, layer, own, facts.parameter_elements, advance)
                result = parameter_basis.NAME, Estimate(reduced(reduce, values))
            else:
                seconds = seconds_of_draws(budget, chosen)
                how = budget.within(seconds, facts.seconds_by_draw), facts.parameter_elements, advance, reduce, seconds
                result = parameter_draws.NAME, parameter_draws.run(task, layer, own, *how)
            outcomes[layer.name] = Outcome(*result, facts.checks, sum(spent))


def _counted(bar: Callable[[int], None], spent: list[int]) -> Callable[[int], None]:
    def advance(count: int) -> None:
        spent.append(count)
        bar(count)

    return advance
