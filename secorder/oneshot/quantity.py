"""The cost of every measurement."""

import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor

from ..errors import InvalidArgumentError
from ..layers.dtypes import compute_dtype
from ..results import Strategy
from .eigenvalues import lanczos
from .fisher_cost import fisher_cost
from .fisher_pairs import FisherType
from .hessian.budget import Budget
from .hessian.choice import Choice
from .hessian.cost import Cost, LayerCost, base_bytes, estimate_cost, layer_cost
from .hessian.facts import Facts
from .measurement import Measurement
from .operators import Operator, ProductInZ, operators
from .timing import TRIAL_SECONDS, seconds_per_product

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
) -> Cost:
    """What a measurement would take, layer by layer.

    Raises:
        InvalidArgumentError: there is no such measurement.
    """
    if quantity in ("hessian", "trace"):
        return estimate_cost(task, budget)
    if quantity == "eigenvalues":
        return _krylov_cost(task, max_iterations)
    if quantity == "fisher":
        return fisher_cost(task, fisher_type, num_draws)
    raise InvalidArgumentError(f'quantity must be "hessian", "trace", "eigenvalues" or "fisher", got {quantity!r}.')


def _krylov_cost(task: Measurement, max_iterations: int) -> Cost:
    """Of all iterations that may be made; most blocks take fewer."""
    sizes: dict[str, Facts] = {}
    timed: dict[str, tuple[Strategy, float]] = {}
    start = time.perf_counter()
    inside = 0.0
    with closing(operators(task, "hessian")) as blocks:
        for layer, product in blocks:
            numel = sum(p.numel() for p in layer.parameters.values())
            sizes[layer.name] = Facts(layer.name, numel, output_elements=numel, parameter_elements=numel)
            if product is None:
                timed[layer.name] = Strategy.UNUSED, 0.0
                continue
            like = next(iter(layer.parameters.values())).detach().new_empty(0, dtype=compute_dtype(layer))
            vector = task.random((numel,), like)
            before = time.perf_counter()
            seconds = seconds_per_product(partial(_iterations, product, vector), 8, TRIAL_SECONDS / len(task.layers))
            inside += time.perf_counter() - before
            timed[layer.name] = Strategy.PARAMETER_PRODUCTS, seconds
            if isinstance(product, ProductInZ):
                z = sum(leaf.numel() for leaf in product.graph.leaves)
                sizes[layer.name] = replace(sizes[layer.name], output_elements=2 * z)
                timed[layer.name] = Strategy.OUTPUT_PRODUCTS, seconds
    overhead = time.perf_counter() - start - inside

    def cost(name: str) -> LayerCost:
        strategy, seconds = timed[name]
        products = 0 if strategy == Strategy.UNUSED else min(max_iterations, sizes[name].numel)
        exact = 0 if strategy == Strategy.UNUSED else sizes[name].numel
        found = layer_cost(task, sizes[name], Choice(strategy, products, exact), products * seconds)
        like = next(iter(next(x for x in task.layers if x.name == name).parameters.values()))
        kept = 2 * products * sizes[name].numel * like.element_size()  # Lanczos' vectors
        return replace(found, num_bytes=found.num_bytes + kept)

    passed = sum(facts.output_elements for facts in sizes.values())
    return Cost({layer.name: cost(layer.name) for layer in task.layers}, overhead, base_bytes(task, passed, passed))


def _iterations(product: Operator, start: Tensor, count: int) -> None:
    lanczos(product, start, 1, 0.0, count)
