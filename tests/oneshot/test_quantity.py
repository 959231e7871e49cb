"""What each measurement would take."""

import pytest

from secorder import InvalidArgumentError, Strategy
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.quantity import quantity_cost

from ..helpers import data, measured, mlp


def cost(quantity: str, **options: object) -> object:
    how = {"fisher_type": "mc", "num_draws": 5, "max_iterations": 7, **options}
    return measured(lambda task: quantity_cost(task, quantity, Budget("exact"), **how), mlp(), data())  # type: ignore[arg-type]


def test_products_are_those_of_what_was_asked() -> None:
    assert {c.num_hvps for c in cost("fisher").values()} == {5}
    assert {c.num_hvps for c in cost("eigenvalues").values()} == {7}
    assert {c.strategy for c in cost("eigenvalues").values()} == {Strategy.OUTPUT_PRODUCTS}
    assert {c.num_hvps for c in cost("eigenvalues", max_iterations=10**6).values()} == {30, 35, 18}  # of the parameters
    assert cost("trace") == cost("hessian")


def test_others_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="quantity must be"):
        cost("gradient")
