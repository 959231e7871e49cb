"""Timing a few products of each layer, where it matters which strategy is taken."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..._torch.vjp import default_chunk_size
from ...layers.layout import DIM_ZERO
from ...layers.selection import Layer
from ...results import Strategy
from ..measurement import Measurement
from ..recorded_layer import contract_pairs, layout_options
from ..recording import Recording
from ..roots import First
from ..timing import (
    METERED_SECONDS,
    SHORT_SECONDS,
    TRIAL_SECONDS,
    bytes_at_once,
    bytes_of_products,
    of_nearest,
    seconds_of,
    seconds_per_product,
)
from . import column_draws, columns, deflation, output_basis, output_draws, parameter_basis, parameter_draws
from .budget import Budget
from .chain import seconds_of_chain
from .choice import EXACT, ExactModule, cheapest, seconds_of_draws
from .estimate import Estimate, draws_for
from .facts import Facts
from .investigate import Findings, along_chain, leave_chain, verify_samples
from .layer_graph import LayerGraph, OutputSide
from .on_parameters import on_parameters
from .output_draws import Reduce

#: Draws whose spread tells how many there will be, at most.
PILOT_DRAWS = 16

#: And at least, however long one takes: fewer have no spread.
LEAST_DRAWS = 2

#: By how much the numbers of products may differ of which one may yet be the faster, each being of another kind.
ALIKE = 4

#: Multiplications from which on a chain may take so long that another strategy is worth a trial.
LONG_WORK = 10_000_000_000


#: Makes so many products, and how many there are at once, at most.
_Trial = tuple[Callable[[int], None], int]


def alike(facts: Facts) -> list[ExactModule]:
    """The strategies for a layer alone of which one may be the fastest: those with no many times as many products."""
    counts = {s.NAME: s.products(facts, Budget()) for s in EXACT if s.applies(facts)}
    return [s for s in EXACT if s.NAME in counts and counts[s.NAME] <= ALIKE * min(counts.values())]


def get_ready(task: Measurement, found: Findings, budget: Budget, carried: Sequence[str]) -> None:
    """Layers that the chain serves, for the strategies that may take its place."""
    if not carried:
        return
    depths = {name: found.facts[name].chain_depth for name in carried}
    leave_chain(task, found, budget, carried)
    for name in carried:
        found.learn(name, chain_depth=depths[name])


def learn_seconds(
    task: Measurement, found: Findings, budget: Budget, recording: Recording, *, draws: Reduce | None = None
) -> dict[str, float]:
    """Time a few products of every layer, and enter into the facts how long they take.

    Args:
        recording: of the layers' calls, which goes on.
        draws: make a few draws of the layers that are to be drawn, too, of what is made of diagonals by this, and look
            at how much memory products take.

    Returns:
        by layer, the seconds that its draws are to take, where draws were made.
    """
    if draws is None:
        _learn_chain(task, found, budget)
    chosen = found.chosen(budget)
    asked = [f.layer for f in found.facts.values() if f.used and not f.last and f.numel]
    compared = [name for name in asked if found.facts[name].chain_seconds is not None]
    asked = [x for x in asked if chosen[x].strategy != Strategy.CHAIN or (draws is None and x in compared)]
    by_columns = [found.graphs[name] for name in asked if columns.applies(found.facts[name])]
    if found.output_side is not None and by_columns and (draws or budget.max_seconds < math.inf):
        trial, most = _of_columns(task, found.output_side, by_columns)
        seconds = max(found.facts[graph.layer.name].seconds_by_column for graph in by_columns)
        if most and not seconds:
            seconds = seconds_per_product(trial, most, TRIAL_SECONDS)
        num_bytes = bytes_of_products(trial, most, seconds, TRIAL_SECONDS) if most and draws else 0
        for graph in by_columns:
            found.learn(graph.layer.name, seconds_by_column=seconds, num_bytes=num_bytes)
        verify_samples(task, found, budget)  # where columns take too long
    chosen = found.chosen(budget)
    asked = [x for x in asked if chosen[x].strategy not in (Strategy.COLUMNS, Strategy.COLUMN_DRAWS)]
    if budget.method == "hutchinson":  # the rest is drawn
        asked = []
    if draws is None and budget.max_seconds == math.inf:
        asked = [x for x in asked if x in compared or len(alike(found.facts[x])) > 1]
    in_z = [x for x in asked if output_basis in _ways(found.facts[x], budget, draws)]
    of_z = {x: _in_z(task, found.graphs[x], found.facts[x]) for x in in_z}
    _learn(found, "seconds", of_z, metered=draws is not None)
    own = {x.name: x for x in task.layers if x.name in asked}
    own = {x: layer for x, layer in own.items() if parameter_basis in _ways(found.facts[x], budget, draws)}
    with recording.paused():
        gradients = {x.name: g for x, g in on_parameters(task, list(own.values()))}
        used = [name for name, g in gradients.items() if any(part is not None for part in g)]
        on_own = {x: _on_parameters(task, own[x], gradients[x], found.facts[x]) for x in used}
        _learn(found, "seconds_on_parameters", on_own, metered=draws is not None)
    verify_samples(task, found, budget)
    return _DrawTrials(task, found, budget, recording, draws).seconds(gradients) if draws else {}


def _ways(facts: Facts, budget: Budget, draws: Reduce | None) -> list[ExactModule]:
    """What is timed: all that may be the fastest, or what it was found to be."""
    return alike(facts) if draws is None else [cheapest(facts, budget)]


def _learn_chain(task: Measurement, found: Findings, budget: Budget) -> None:
    """Time the chain, where it takes long, and get its layers ready for the strategies that may take its place."""
    names = found.going_by(budget, Strategy.CHAIN)
    if sum(found.facts[name].chain_work for name in names) <= LONG_WORK:
        return
    seconds = along_chain(task, found, budget, partial(seconds_of_chain, task)) or {}
    if sum(seconds.values()) < TRIAL_SECONDS:  # that of the others would take as long
        return
    get_ready(task, found, budget, names)
    for name in names:
        found.learn(name, chain_seconds=seconds[name])


def _learn(found: Findings, fact: str, trials: Mapping[str, _Trial], *, metered: bool) -> None:
    """Enter into the facts of layers how long a product takes, unless it is known, and perhaps how much memory.

    Half of the time is for all alike, and half for those that take many products, which all depends on.
    """
    kinds = {name: (found.facts[name].outputs, found.facts[name].numel) for name in trials}
    counts = {name: min(x for x in kind if x) for name, kind in kinds.items()}
    allowed = {
        name: TRIAL_SECONDS * (0.5 / len(counts) + 0.5 * count / sum(counts.values())) for name, count in counts.items()
    }
    unknown = {name: kind for name, kind in kinds.items() if not getattr(found.facts[name], fact)}

    def seconds(name: str) -> float:
        return seconds_per_product(*trials[name], allowed[name])

    def num_bytes(name: str) -> int:
        return bytes_of_products(*trials[name], getattr(found.facts[name], fact), allowed[name])

    for name in list(unknown)[:1]:
        trials[name][0](1)  # what happens the first time alone
    for name, (told, other) in of_nearest(unknown, seconds).items():  # as much longer as more comes after it
        found.learn(name, **{fact: told * found.facts[name].passed / max(1, found.facts[other].passed)})
    if metered:
        _learn_bytes(found, {name: most for name, (_, most) in trials.items()}, kinds, num_bytes)


def _learn_bytes(
    found: Findings, at_once: Mapping[str, int], kinds: Mapping[str, Hashable], num_bytes: Callable[[str], int]
) -> None:
    """Enter into the facts how much memory products take, first of layers where most is passed through ``at_once``."""
    names = sorted(at_once, key=lambda name: -at_once[name] * found.facts[name].passed)
    of_each = of_nearest({name: kinds[name] for name in names}, num_bytes, METERED_SECONDS, in_order=True)
    for name, (metered, _) in of_each.items():
        found.learn(name, num_bytes=metered)


class _DrawTrials:
    """A few draws of the layers that are to be drawn: how long all will take, and how much memory.

    Args:
        recording: of the layers' calls, which goes on.
        reduce: what draws are of, of what is made of diagonals.
    """

    def __init__(
        self, task: Measurement, found: Findings, budget: Budget, recording: Recording, reduce: Reduce
    ) -> None:
        self.task, self.found, self.budget, self.recording, self.reduce = task, found, budget, recording, reduce
        self.chosen = found.chosen(budget)
        self.limit = seconds_of_draws(budget, self.chosen)

    def seconds(self, gradients: Mapping[str, list[Tensor | None]]) -> dict[str, float]:
        """By layer, the seconds that its draws are to take; of some, ``gradients`` on the parameters are known."""
        together = self.found.going_by(self.budget, Strategy.COLUMN_DRAWS)
        expected = self._of_columns(together, self.budget)
        alone = self.found.going_by(self.budget, Strategy.OUTPUT_DRAWS, Strategy.PARAMETER_DRAWS)
        expected |= self._of_layers(alone, gradients)
        for name, seconds in self._of_columns_beside(alone).items():
            expected[name] += seconds
        return expected

    def _of_columns(self, names: Sequence[str], budget: Budget) -> dict[str, float]:
        """Of layers of which columns are drawn, all at once."""
        side, graphs = self.found.output_side, [self.found.graphs[name] for name in names]
        if side is None or not graphs:
            return {}
        work: _Draws = partial(column_draws.run, self.task, side, graphs, reduce=self.reduce)
        _, seconds = _seconds_of_draws(work, budget, len(names) * self.limit, TRIAL_SECONDS)
        return {name: seconds / len(names) for name in names}

    def _of_layers(self, names: Sequence[str], gradients: Mapping[str, list[Tensor | None]]) -> dict[str, float]:
        """Of layers that are drawn each by itself, on their outputs or on their parameters."""
        facts, chosen, budget, limit = self.found.facts, self.chosen, self.budget, self.limit
        works, sizes = self._works(names, gradients)
        budgets = {name: budget.within(limit, facts[name].seconds_by_draw) for name in names}
        few = [x for x in names if budgets[x].max_draws < budget.num_draws]  # so few that there is nothing to decide
        many = [x for x in names if x not in few]
        expected = {x: budgets[x].max_draws * facts[x].seconds_by_draw for x in few}
        part = max(SHORT_SECONDS, TRIAL_SECONDS / max(1, len(names)))
        kinds = {x: chosen[x].strategy for x in many}  # beside which it is what comes after a layer that counts
        if many:
            works[many[0]](
                replace(budget, num_draws=LEAST_DRAWS, rtol=None), limit
            )  # what happens the first time alone
        of_each = of_nearest(kinds, lambda name: _seconds_of_draws(works[name], budgets[name], limit, part))
        of_one: dict[str, float] = {}
        for name, ((by_draw, seconds), like) in of_each.items():
            mine, other = facts[name].seconds_by_draw, facts[like].seconds_by_draw
            scale = mine / other if mine and other else 1.0
            of_one[name] = scale * by_draw
            expected[name] = min(scale * seconds, limit)
            if chosen[name].strategy == Strategy.OUTPUT_DRAWS and _decided_by_draws(self.found, name, budgets[name]):
                expected[name] += 2 * deflation.PILOT_DRAWS * of_one[name]

        def num_bytes(name: str) -> int:
            return _bytes_of_draws(works[name], budgets[name], sizes[name], part / max(of_one[name], 1e-9))

        _learn_bytes(self.found, {name: sizes[name] for name in many}, kinds, num_bytes)
        return expected

    def _works(
        self, names: Sequence[str], gradients: Mapping[str, list[Tensor | None]]
    ) -> tuple[dict[str, "_Draws"], dict[str, int]]:
        """Draws of each layer, and how many are made at a time."""
        layers = {layer.name: layer for layer in self.task.layers if layer.name in names}
        on_own = [x for x in layers.values() if self.chosen[x.name].strategy == Strategy.PARAMETER_DRAWS]
        with self.recording.paused():
            more = on_parameters(self.task, [x for x in on_own if x.name not in gradients])
            gradients = {**gradients, **{x.name: own for x, own in more}}
        works: dict[str, _Draws] = {}
        sizes: dict[str, int] = {}
        for name in names:
            facts, layer = self.found.facts[name], layers[name]
            if layer in on_own:
                elements = facts.parameter_elements
                works[name] = partial(self._on_parameters, layer, gradients[name], elements)
            else:
                elements = facts.output_elements + facts.numel
                works[name] = partial(self._on_outputs, name, elements)
            sizes[name] = self.task.products_at_once(elements, next(iter(layer.parameters.values())))
        return works, sizes

    def _on_outputs(self, name: str, elements: int, budget: Budget, seconds: float) -> list[Estimate]:
        graph = self.found.graphs[name]
        return [output_draws.run(self.task, graph, budget, elements, lambda _: None, self.reduce, None, seconds)[1]]

    def _on_parameters(
        self, layer: Layer, own: Sequence[Tensor | None], elements: int, budget: Budget, seconds: float
    ) -> list[Estimate]:
        with self.recording.paused():
            return [parameter_draws.run(self.task, layer, own, budget, elements, lambda _: None, self.reduce, seconds)]

    def _of_columns_beside(self, drawn: Sequence[str]) -> dict[str, float]:
        """What the Gauss-Newton part of drawn layers takes, by columns, or by columns and draws where they are many."""
        found, budget, side = self.found, self.budget, self.found.output_side
        names = [x for x in gauss_newton_alone(found, budget) if x in drawn and _columns_affordable(found, x, budget)]
        if side is None:
            return {}
        few = [x for x in names if found.facts[x].num_columns <= budget.num_draws]
        seconds: dict[str, float] = {}
        if few:
            trial, most = _of_columns(self.task, side, [found.graphs[x] for x in few])
            by_column = seconds_per_product(trial, most, TRIAL_SECONDS) if most else 0.0
            seconds |= {x: found.facts[x].num_columns * by_column / len(few) for x in few}
        return seconds | self._of_columns([x for x in names if x not in few], budget.closer(0.5))


def gauss_newton_alone(found: Findings, budget: Budget) -> list[str]:
    """The layers of which columns give the Gauss-Newton part, and draws the rest, where that is the easier."""
    if budget.method != "hutchinson":
        return []
    return [name for name, graph in found.graphs.items() if found.facts[name].num_columns and graph.residual]


def _decided_by_draws(found: Findings, name: str, budget: Budget) -> bool:
    """Whether a few draws of all and a few of what the Gauss-Newton part leaves are made first, to take the easier."""
    possible = name in gauss_newton_alone(found, budget) and _columns_affordable(found, name, budget)
    return possible and budget.num_draws > 2 * deflation.PILOT_DRAWS


def _columns_affordable(found: Findings, name: str, budget: Budget) -> bool:
    """Whether there are few enough columns for all of them, or they may be drawn."""
    return found.facts[name].columns_drawn or found.facts[name].num_columns <= budget.num_draws


#: Draws by a budget, in so many seconds.
_Draws = Callable[[Budget, float], list[Estimate]]


def _seconds_of_draws(work: _Draws, budget: Budget, limit: float, allowance: float) -> tuple[float, float]:
    """Of one draw, and of all that the budget asks for in a limit; the first ones, in an allowance, tell how many.

    Each run does something besides.
    """

    def seconds_of_some(count: int) -> float:
        return seconds_of(lambda: work(replace(budget, num_draws=count, rtol=None), limit))

    one = seconds_of_some(1)
    if one < SHORT_SECONDS:
        one = min(one, seconds_of_some(1))  # what happens the first time alone is no part of it
    count = min(budget.num_draws, PILOT_DRAWS, max(LEAST_DRAWS, int(allowance / max(one, 1e-9))))
    told: list[Estimate] = []

    def tried() -> None:
        told.extend(work(replace(budget, num_draws=count), min(limit, allowance)))

    at_once = budget.rtol is not None and count == LEAST_DRAWS  # so long that they are most of it
    seconds = seconds_of(tried) if at_once else seconds_of_some(count)
    made = max(count, max((estimate.num_draws for estimate in told), default=0))
    by_draw = min(seconds, (seconds - one) * made / (made - 1) if seconds > one and made > 1 else seconds) / made
    if budget.rtol is not None and not at_once:
        seconds = seconds_of(tried)
    if budget.rtol is None:
        return by_draw, seconds + (budget.num_draws - count) * by_draw
    worst = max(told, key=lambda estimate: estimate.relative_error)
    if not worst.errors:
        return by_draw, seconds
    wanted = draws_for(budget, worst.num_draws, worst.errors, worst)
    wanted = max(budget.num_draws, worst.num_draws if worst.converged else min(budget.max_draws, wanted))
    return by_draw, seconds + min(max(0.0, wanted - worst.num_draws) * by_draw, max(0.0, limit - seconds))


def _bytes_of_draws(work: _Draws, budget: Budget, size: int, possible: float) -> int:
    """Memory of as many draws as are made at a time; 0 where there is no time for some."""
    most = min(size, budget.num_draws if budget.rtol is None else budget.max_draws)
    count = min(most, PILOT_DRAWS, int(possible))
    if count < LEAST_DRAWS:
        return 0
    return bytes_at_once(lambda draws: work(replace(budget, num_draws=draws, rtol=None), math.inf), most, count)


def _in_z(task: Measurement, graph: LayerGraph, facts: Facts) -> _Trial:
    def trial(count: int) -> None:
        output_basis.run(task, graph, facts.output_elements, lambda _: None, count)

    size = task.products_at_once(facts.output_elements, graph.leaves[0])
    return trial, min(size, facts.outputs)


def _on_parameters(task: Measurement, layer: Layer, own: Sequence[Tensor | None], facts: Facts) -> _Trial:
    def trial(count: int) -> None:
        parameter_basis.run(task, layer, own, facts.parameter_elements, lambda _: None, count)

    like = task.isolated.replacements(layer)[0]
    size = task.products_at_once(facts.parameter_elements, like)
    return trial, min(size, facts.numel)


def _of_columns(task: Measurement, side: OutputSide, graphs: Sequence[LayerGraph]) -> _Trial:
    """Of columns, for all layers together."""
    root = side.find_root(task.chunk_size)
    options = ((g, next(iter(layout_options(g, task.num_samples)), [])) for g in graphs)
    usual = [replace(g, layouts=first) for g, first in options if set(first) == {DIM_ZERO}]  # a trial verifies none

    def trial(count: int) -> None:
        contract_pairs(task, side.model_outputs, usual, First(root, count))

    elements = sum(t.numel() for graph in graphs for t in graph.leaves) + sum(t.numel() for t in side.model_outputs)
    size = default_chunk_size(elements, side.model_outputs[0], task.chunk_size)
    return trial, min(size, root.num_columns) if usual else 0
