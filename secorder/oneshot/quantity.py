"""The cost of every measurement."""

from typing import Literal

from ..errors import InvalidArgumentError
from ..results import Strategy
from .fisher_cost import fisher_choices
from .fisher_pairs import FisherType
from .hessian.budget import Budget
from .hessian.choice import Choice
from .hessian.cost import LayerCost, estimate_cost, layer_cost
from .hessian.facts import Facts
from .hessian.investigate import investigate
from .measurement import Measurement
from .recording import recorded

__all__ = ["Quantity", "quantity_cost"]

#: Whose cost is asked for.
Quantity = Literal["hessian", "trace", "eigenvalues", "fisher"]


def quantity_cost(
    task: Measurement,
    quantity: Quantity,
    budget: Budget,
    fisher_type: FisherType,
    num_draws: int,
    max_iterations: int,
) -> dict[str, LayerCost]:
    """What a measurement would take, layer by layer.

    Raises:
        InvalidArgumentError: there is no such measurement.
    """
    if quantity in ("hessian", "trace"):
        return estimate_cost(task, budget)
    if quantity == "eigenvalues":
        return _krylov_cost(task, max_iterations)
    if quantity == "fisher":
        chosen = fisher_choices(task, fisher_type, num_draws)
        return {name: layer_cost(task, facts, choice) for name, (facts, choice) in chosen.items()}
    raise InvalidArgumentError(f'quantity must be "hessian", "trace", "eigenvalues" or "fisher", got {quantity!r}.')


def _krylov_cost(task: Measurement, max_iterations: int) -> dict[str, LayerCost]:
    with recorded(task.isolated, task.ruled, own_parameters=False) as recording:
        found = investigate(task, recording, Budget("hutchinson"), columns=False)
        in_z = {name for name, graph in found.graphs.items() if found.facts[name].own_use and graph.layouts}

    def cost(facts: Facts) -> LayerCost:
        products = min(max_iterations, facts.numel)
        choice = Choice(
            Strategy.OUTPUT_PRODUCTS if facts.layer in in_z else Strategy.PARAMETER_PRODUCTS, products, facts.numel
        )
        return layer_cost(task, facts, choice if facts.used else Choice(Strategy.UNUSED, 0, 0))

    return {layer.name: cost(found.facts[layer.name]) for layer in task.layers}
