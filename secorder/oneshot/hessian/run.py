"""Carrying out what was chosen, layer by layer: for diagonals, and for traces of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from ...layers.dtypes import zeros
from ...monitor.progress import progress_bar
from ...results import Strategy
from ..measurement import Measurement
from ..recording import recorded
from ..timing import seconds_of
from . import chain, column_draws, columns, output_basis, output_draws, parameter_basis, parameter_draws
from .budget import Budget
from .choice import seconds_of_draws
from .decision import decide
from .estimate import Estimate
from .investigate import Findings, along_chain, investigate, verify_samples
from .layer_graph import LayerGraph, OutputSide
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
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        found = investigate(task, recording, budget, columns=True)
        run = _Run(task, found, budget, reduce)
        by_chain = decide(task, found, budget, recording)
        seconds = seconds_of(run.along_chain)
        if run.outcomes:
            run.budget = budget.after(seconds if by_chain is None else by_chain)
            verify_samples(task, found, run.budget)  # of those that there is not enough time for now
        known = {} if found.output_side is None else run.by_columns(found.output_side)
        run.in_z(known)
    run.on_parameters()
    return {layer.name: run.outcomes[layer.name] for layer in task.layers}


@dataclass
class _Run:
    """A measurement while one strategy after the other finishes its layers."""

    task: Measurement
    found: Findings
    budget: Budget
    reduce: Reduce
    outcomes: dict[str, Outcome] = field(default_factory=dict)  #: of the layers that are finished

    def finish(
        self, name: str, strategy: Strategy, values: Estimate | Sequence[Tensor], num_hvps: int, **checks: bool
    ) -> None:
        """Enter an estimate of a layer, or its whole diagonal."""
        self.outcomes[name] = Outcome(strategy, self.told(values), self.found.facts[name].checks | checks, num_hvps)

    def told(self, values: Estimate | Sequence[Tensor]) -> Estimate:
        """What is wanted of a diagonal that is exact."""
        return values if isinstance(values, Estimate) else Estimate(reduced(self.reduce, values))

    def along_chain(self) -> None:
        """Finish the layers that the chain serves."""
        carried = along_chain(self.task, self.found, self.budget, partial(chain.run, self.task))
        for name, values in (carried or {}).items():
            spent = self.found.graphs[name].num_hvps + self.found.facts[name].chain_products
            self.finish(name, chain.NAME, values, spent, samples_independent=True)

    def by_columns(self, side: OutputSide) -> dict[str, Estimate]:
        """Finish the layers that columns serve; returns what they give of those that are drawn."""
        found, budget, chosen = self.found, self.budget, self.found.chosen(self.budget)
        strategies = {name: choice.strategy for name, choice in chosen.items()}
        gauss_newton = set(gauss_newton_alone(found, budget))
        few = {name for name in gauss_newton if found.facts[name].num_columns <= budget.num_draws}
        served = [g for name, g in found.graphs.items() if strategies[name] == Strategy.COLUMNS or name in few]
        known = self.all_columns(side, served)
        lost = any(strategies[g.layer.name] == Strategy.COLUMNS and g.layer.name not in known for g in served)
        many = {name for name in gauss_newton - few if found.facts[name].columns_drawn}
        drawn = [g for name, g in found.graphs.items() if strategies[name] == Strategy.COLUMN_DRAWS or name in many]
        if drawn:
            closer = budget.closer(0.5) if many else budget  # what is drawn besides has an error of its own
            seconds = len(drawn) * seconds_of_draws(budget, chosen)
            total = found.facts[drawn[0].layer.name].num_columns
            with progress_bar(self.task.progress, "Hessian by columns and draws", total) as bar:
                estimates = column_draws.run(self.task, side, drawn, closer, seconds, self.reduce, bar)
            known |= {graph.layer.name: estimate for graph, estimate in zip(drawn, estimates, strict=True)}
        for name in [x for x in known if strategies[x] in (Strategy.COLUMNS, Strategy.COLUMN_DRAWS)]:
            spent = found.graphs[name].num_hvps
            self.finish(name, strategies[name], known.pop(name), spent, outputs_by_sample=True)
        if lost:
            verify_samples(self.task, found, budget)
        return known

    def all_columns(self, side: OutputSide, served: Sequence[LayerGraph]) -> dict[str, Estimate]:
        """What all columns give of these layers; one that they turn out not to serve is missing, and learns so."""
        before = [graph.layouts for graph in served]
        given = columns.run(self.task, side, served) if served else []
        known = {}
        for graph, values, layouts in zip(served, given, before, strict=True):
            name = graph.layer.name
            if values is None:
                graph.layouts = layouts  # which others go by
                self.found.learn(name, num_columns=0, columns_drawn=False)
            else:
                known[name] = self.told(values)
        return known

    def in_z(self, known: dict[str, Estimate]) -> None:
        """Finish the layers that go by z, on the graph that was recorded; columns may have given a part of them."""
        chosen, order = self.found.chosen(self.budget), (output_basis.NAME, output_draws.NAME)
        todo = [name for name, choice in chosen.items() if choice.strategy in order and name not in self.outcomes]
        todo.sort(key=lambda name: order.index(chosen[name].strategy))
        total, limit = sum(chosen[name].products for name in todo), seconds_of_draws(self.budget, chosen)
        with progress_bar(self.task.progress and bool(total), "Hessian in z", total) as bar:
            for name in todo:
                graph, facts = self.found.graphs[name], self.found.facts[name]
                spent = [graph.num_hvps]
                advance = _counted(bar, spent)
                if chosen[name].strategy == output_basis.NAME:
                    values = output_basis.run(self.task, graph, facts.output_elements, advance)
                    self.finish(name, output_basis.NAME, values, sum(spent))
                else:
                    budget, elements = (
                        self.budget.within(limit, facts.seconds_by_draw),
                        facts.output_elements + facts.numel,
                    )
                    how = budget, elements, advance, self.reduce, known.get(name), limit
                    self.finish(name, *output_draws.run(self.task, graph, *how), sum(spent))
                graph.output_gradients = graph.residual = []  # frees the graph as far as no other layer needs it

    def on_parameters(self) -> None:
        """Finish the others: by the parameters, on a graph of their own, or as zeros where they are not used."""
        chosen = self.found.chosen(self.budget)
        todo = [layer for layer in self.task.layers if layer.name not in self.outcomes]
        for layer in todo:
            if chosen[layer.name].strategy == Strategy.UNUSED:
                self.finish(layer.name, Strategy.UNUSED, zeros(layer), 0)
        todo = [layer for layer in todo if layer.name not in self.outcomes]
        total, limit = sum(chosen[layer.name].products for layer in todo), seconds_of_draws(self.budget, chosen)
        with progress_bar(self.task.progress and bool(total), "Hessian on parameters", total) as bar:
            for layer, own in on_parameters(self.task, todo):
                facts, graph = self.found.facts[layer.name], self.found.graphs.get(layer.name)
                spent = [graph.num_hvps if graph else 0]
                advance = _counted(bar, spent)
                if all(g is None for g in own):
                    self.finish(layer.name, Strategy.UNUSED, zeros(layer), sum(spent))
                elif chosen[layer.name].strategy == parameter_basis.NAME:
                    values = parameter_basis.run(self.task, layer, own, facts.parameter_elements, advance)
                    self.finish(layer.name, parameter_basis.NAME, values, sum(spent))
                else:
                    budget, elements = self.budget.within(limit, facts.seconds_by_draw), facts.parameter_elements
                    estimate = parameter_draws.run(self.task, layer, own, budget, elements, advance, self.reduce, limit)
                    self.finish(layer.name, parameter_draws.NAME, estimate, sum(spent))


def _counted(bar: Callable[[int], None], spent: list[int]) -> Callable[[int], None]:
    def advance(count: int) -> None:
        spent.append(count)
        bar(count)

    return advance
