"""The cost of each quantity that can be measured."""

import math
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from .._arguments import require_one_of
from .._torch.memory import most_bytes
from ..results import Strategy
from .eigenvalues import Eigenvalues, Ends, lanczos, rows_of_basis, start_of
from .fisher_cost import fisher_cost
from .fisher_pairs import Asked
from .hessian.budget import Budget
from .hessian.cost import Cost, LayerCost, estimate_cost
from .hessian.output_draws import whole
from .measurement import Measurement
from .operators import Operator, ProductInZ, operators
from .timing import TRIAL_SECONDS, seconds_of
from .trace import sums

#: Whose cost is asked for.
Quantity = Literal["hessian", "trace", "eigenvalues", "fisher"]

#: Iterations of the first trial.
_FIRST = 10


def quantity_cost(task: Measurement, quantity: Quantity, budget: Budget, asked: Asked, ends: Ends) -> Cost:
    """What a measurement would take, layer by layer."""
    require_one_of("quantity", quantity, get_args(Quantity))
    if quantity in ("hessian", "trace"):
        return estimate_cost(task, budget, sums("layer") if quantity == "trace" else whole)
    if quantity == "eigenvalues":
        return _krylov_cost(task, ends)
    return fisher_cost(task, asked, None if budget.rtol is None else budget)


def _krylov_cost(task: Measurement, ends: Ends) -> Cost:
    """Of the iterations that a short trial tells of."""
    costs: dict[str, LayerCost] = {}

    def opened() -> None:
        with closing(operators(task, "hessian")) as blocks:
            for _ in blocks:  # of which the last ones may be on a graph of their own
                pass

    kept = most_bytes(opened)
    start = time.perf_counter()
    inside = 0.0
    with closing(operators(task, "hessian")) as blocks:
        for layer, product in blocks:
            numel = sum(layer.sizes())
            if product is None:
                costs[layer.name] = LayerCost(Strategy.UNUSED, 0, 0, 0)
                continue
            vector = start_of(task, layer, product, slice(0, numel))
            before = time.perf_counter()
            allowance = TRIAL_SECONDS / len(task.layers)
            of_product = most_bytes(partial(product, vector))  # with what happens the first time alone
            seconds, wanted = _cost_of_lanczos(product, vector, ends, allowance)
            num_bytes = of_product + rows_of_basis(wanted) * vector.numel() * vector.element_size()
            inside += time.perf_counter() - before
            in_z = isinstance(product, ProductInZ)
            strategy = Strategy.OUTPUT_PRODUCTS if in_z else Strategy.PARAMETER_PRODUCTS
            costs[layer.name] = LayerCost(strategy, min(ends.max_iterations, numel), numel, num_bytes, seconds)
    overhead = time.perf_counter() - start - inside
    return Cost({layer.name: costs[layer.name] for layer in task.layers}, overhead, kept)


def _cost_of_lanczos(product: Operator, start: Tensor, ends: Ends, allowance: float) -> tuple[float, int]:
    """How long it takes to converge, and how many iterations, by those that there is time for.

    Residuals fall geometrically, about.
    """
    most, count = min(ends.max_iterations, len(start)), _FIRST
    runs: list[Eigenvalues] = []
    begun = time.perf_counter()
    while True:
        some = replace(ends, max_iterations=min(count, most))
        seconds = seconds_of(lambda: runs.append(lanczos(product, start, some)))  # noqa: B023
        found = runs[-1]
        if found.converged or count >= most:
            return seconds, found.num_hvps
        if time.perf_counter() - begun > allowance:
            break
        count *= 2
    fallen = math.log(found.residual / max(1e-300, *map(abs, found.top + found.bottom)))
    wanted = found.num_hvps * math.log(max(ends.tolerance, 1e-300)) / fallen if fallen < 0 else most
    wanted = min(most, max(wanted, found.num_hvps))
    return seconds * wanted / found.num_hvps, math.ceil(wanted)
