"""Which strategy for which layer: a pure function of facts and a budget, to be called and printed."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from ...results import Strategy
from . import chain, column_draws, columns, output_basis, output_draws, parameter_basis, parameter_draws
from .budget import Budget
from .facts import Facts

__all__ = ["choose"]


class StrategyModule(Protocol):
    """What every strategy's module says of itself, besides how it is run."""

    NAME: Strategy

    def applies(self, facts: Facts) -> bool:
        """Whether it gives the layer's curvature (exactly, or without bias)."""

    def products(self, facts: Facts, budget: Budget) -> int:
        """How many products it takes."""


class ExactModule(StrategyModule, Protocol):
    """What an exact strategy says besides."""

    def seconds(self, facts: Facts) -> float:
        """What a product takes; 0 where none was timed."""


#: Exact strategies for one layer, and estimates: the first that applies is taken, of the cheapest exact ones.
EXACT: tuple[ExactModule, ...] = (output_basis, parameter_basis)
DRAWN: tuple[StrategyModule, ...] = (column_draws, output_draws, parameter_draws)


@dataclass(frozen=True)
class Choice:
    """The strategy for a layer, and its cost."""

    strategy: Strategy  #: its name
    #: Hessian-vector products that it takes; of columns, vector-Jacobian products for all layers together; of draws,
    #: the least number
    products: int
    exact_products: int  #: those of the cheapest exact strategy that applies


def choose(facts: Collection[Facts], budget: Budget) -> dict[str, Choice]:
    """By layer, its strategy; all facts are of one measurement, since columns serve several layers together.

    Example:
        >>> from secorder.oneshot.hessian.budget import Budget
        >>> from secorder.oneshot.hessian.choice import choose
        >>> from secorder.oneshot.hessian.facts import Facts
        >>> facts = Facts("fc", numel=50, own_use=True, samples_independent=True, outputs=5)
        >>> choose([facts], Budget(method="exact"))["fc"].strategy
        'output-basis'
    """
    by_chain = {f.layer for f in _chain_pays(facts, budget)}
    rest = [f for f in facts if f.layer not in by_chain]
    pay = _columns_pay(rest, budget)
    by_columns = {f.layer for f in rest if columns.applies(f) and (f.last or pay)}
    chosen = {f.layer: _choose(f, budget, f.layer in by_columns, f.layer in by_chain) for f in facts}
    for f in _too_long(facts, budget, chosen):
        chosen[f.layer] = _drawn(f, budget, chosen[f.layer].exact_products)
    return chosen


def _too_long(facts: Collection[Facts], budget: Budget, chosen: dict[str, Choice]) -> list[Facts]:
    """The layers that are not exact, so that all together stay within the budget's seconds: the most expensive ones."""
    together = [f for f in facts if chosen[f.layer].strategy == columns.NAME and not f.last]
    exact = [f for f in facts if chosen[f.layer].strategy in (s.NAME for s in EXACT)]
    costs = [(seconds_of_exact(f, budget), [f]) for f in exact]
    if together:
        costs.append((together[0].num_columns * together[0].seconds_by_column, together))
    if sum(cost for cost, _ in costs) <= budget.max_seconds:
        return []
    spent, rest = 0.0, []
    for cost, group in sorted(costs, key=lambda pair: pair[0]):
        spent += cost
        if spent > budget.max_seconds / 2:  # the other half is for draws
            rest += group
    return rest


def _choose(facts: Facts, budget: Budget, by_columns: bool, by_chain: bool) -> Choice:
    if not facts.used:
        return Choice(Strategy.UNUSED, 0, 0)
    if by_chain:
        products = chain.products(facts, budget)
        return Choice(chain.NAME, products, products)
    if by_columns:
        products = columns.products(facts, budget)
        return Choice(columns.NAME, products, products)
    exact = cheapest(facts, budget)
    least = exact.products(facts, budget)
    if budget.affords(least, facts.passed, exact.seconds(facts)):
        return Choice(exact.NAME, least, least)
    return _drawn(facts, budget, least)


def _drawn(facts: Facts, budget: Budget, exact_products: int) -> Choice:
    drawn = next(s for s in DRAWN if s.applies(facts))
    return Choice(drawn.NAME, drawn.products(facts, budget), exact_products)


def seconds_of_draws(budget: Budget, chosen: dict[str, Choice]) -> float:
    """What the draws of one layer may take: an equal part of what all may take."""
    drawn = sum(choice.strategy in (s.NAME for s in DRAWN) for choice in chosen.values())
    return budget.draw_seconds / max(1, drawn)


def cheapest(facts: Facts, budget: Budget) -> ExactModule:
    """The exact strategy that takes the fewest seconds, where all were timed, or products: the first of several."""
    possible = [s for s in EXACT if s.applies(facts)]
    timed = all(s.seconds(facts) for s in possible)
    return min(possible, key=lambda s: s.products(facts, budget) * (s.seconds(facts) if timed else 1))


def seconds_of_exact(facts: Facts, budget: Budget) -> float:
    """What the cheapest exact strategy for this layer alone takes; 0 where it was not timed."""
    exact = cheapest(facts, budget)
    return exact.products(facts, budget) * exact.seconds(facts)


def _chain_pays(facts: Collection[Facts], budget: Budget) -> list[Facts]:
    """The layers that the chain serves: as far as carrying on takes no more than the basis of z of those ahead."""
    served = sorted((f for f in facts if f.used and chain.applies(f)), key=lambda f: f.chain_depth)
    timed = [f for f in served if f.chain_seconds is not None]
    best: list[Facts] = []
    saved = most = 0.0
    for index, f in enumerate(timed or served):
        if f.chain_seconds is None:
            saved += f.basis_work - f.chain_work
        elif f.chain_products:  # of what is the output, the loss tells as fast
            saved += seconds_of_exact(f, budget) - f.chain_seconds
        if saved >= most and chain.affords(served[: index + 1], budget):
            best, most = served[: index + 1], saved
    # Where z is the output, H_z would be formed whole, of which the loss's diagonal may be all.
    return best if any(f.chain_products or f.outputs**2 <= 4 * f.numel for f in best) else []


def _columns_pay(facts: Collection[Facts], budget: Budget) -> bool:
    """Whether columns, which serve all layers that they apply to at once, take no more than the other strategies."""
    served = [f for f in facts if columns.applies(f) and not f.last]
    if not served:
        return False
    count, passed = served[0].num_columns, served[0].passed_by_column
    if budget.method == "hutchinson":
        return count <= budget.num_draws
    others = sum(min(f.outputs or f.numel, f.numel) for f in served)
    return count <= others and budget.affords(count, passed, served[0].seconds_by_column)
