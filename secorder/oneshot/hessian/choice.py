"""Which strategy for which layer: a pure function of facts and a budget, to be called and printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...results import Strategy
from . import chain, columns, output_basis, output_draws, parameter_basis, parameter_draws, unused
from .budget import Budget
from .facts import Facts

__all__ = ["DRAWN", "EXACT", "Choice", "StrategyModule", "choose"]


class StrategyModule(Protocol):
    """What every strategy's module says of itself, besides how it is run."""

    NAME: Strategy

    def applies(self, facts: Facts) -> bool:
        """Whether it gives the layer's curvature (exactly, or without bias)."""

    def products(self, facts: Facts, budget: Budget) -> int:
        """How many products it takes."""


#: Exact strategies for one layer, and estimates: the first that applies is taken, of the cheapest exact ones.
EXACT: tuple[StrategyModule, ...] = (output_basis, parameter_basis)
DRAWN: tuple[StrategyModule, ...] = (output_draws, parameter_draws)


@dataclass(frozen=True)
class Choice:
    """The strategy for a layer, and its cost.

    Attributes:
        strategy: its name.
        products: Hessian-vector products that it takes; of columns, vector-Jacobian products for all layers together;
            of draws, the least number.
        exact_products: those of the cheapest exact strategy that applies.
    """

    strategy: Strategy
    products: int
    exact_products: int


def choose(facts: Sequence[Facts], budget: Budget) -> dict[str, Choice]:
    """A strategy for every layer.

    Args:
        facts: what is known of the layers, all of one measurement: columns serve several together.
        budget: how exact, how expensive.

    Returns:
        layer name → its strategy.
    """
    by_chain = {f.layer for f in _chain_pays(facts, budget)}
    rest = [f for f in facts if f.layer not in by_chain]
    pay = _columns_pay(rest, budget)
    by_columns = {f.layer for f in rest if columns.applies(f) and (f.last or pay)}
    return {f.layer: _choose(f, budget, f.layer in by_columns, f.layer in by_chain) for f in facts}


def _choose(facts: Facts, budget: Budget, by_columns: bool, by_chain: bool) -> Choice:
    if unused.applies(facts):
        return Choice(unused.NAME, 0, 0)
    if by_chain:
        products = chain.products(facts, budget)
        return Choice(chain.NAME, products, products)
    if by_columns:
        products = columns.products(facts, budget)
        return Choice(columns.NAME, products, products)
    exact = cheapest(facts, budget)
    least = exact.products(facts, budget)
    if budget.affords(least, facts.passed):
        return Choice(exact.NAME, least, least)
    drawn = next(s for s in DRAWN if s.applies(facts))
    return Choice(drawn.NAME, drawn.products(facts, budget), least)


def cheapest(facts: Facts, budget: Budget) -> StrategyModule:
    """The exact strategy with the fewest products, the first of several."""
    return min((s for s in EXACT if s.applies(facts)), key=lambda s: s.products(facts, budget))


def _chain_pays(facts: Sequence[Facts], budget: Budget) -> list[Facts]:
    """The layers that the chain serves: as far as carrying on takes no more than the basis of z of those ahead."""
    served = sorted((f for f in facts if f.used and chain.applies(f)), key=lambda f: f.chain_depth)
    best: list[Facts] = []
    saved = most = 0
    for index, f in enumerate(served):
        saved += f.basis_work - f.chain_work
        if saved >= most and chain.affords(served[: index + 1], budget):
            best, most = served[: index + 1], saved
    return best


def _columns_pay(facts: Sequence[Facts], budget: Budget) -> bool:
    """Whether columns, which serve all layers that they apply to at once, take no more than the other strategies."""
    served = [f for f in facts if columns.applies(f) and not f.last]
    if not served:
        return False
    count, passed = served[0].num_columns, served[0].passed_by_column
    if budget.method == "hutchinson":
        return count <= budget.num_draws
    others = sum(min(f.outputs or f.numel, f.numel) for f in served)
    return count <= others and budget.affords(count, passed)
