"""What each measurement would take."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import CurvatureProbe, InvalidArgumentError, Strategy
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.quantity import quantity_cost

from ..benchmarks.memory import peak_memory
from ..helpers import data, measured, mlp, seed, seeded


def cost(quantity: str, **options: object) -> object:
    how = {"fisher_type": "mc", "num_draws": 5, "max_iterations": 7, **options}
    return measured(lambda task: quantity_cost(task, quantity, Budget("exact"), **how), mlp(), data())  # type: ignore[arg-type]


def test_products_are_those_of_what_was_asked() -> None:
    assert {c.num_hvps for c in cost("fisher").values()} == {5}
    assert {c.num_hvps for c in cost("eigenvalues").values()} == {7}
    assert {c.strategy for c in cost("eigenvalues").values()} == {Strategy.OUTPUT_PRODUCTS}
    assert {c.num_hvps for c in cost("eigenvalues", max_iterations=10**6).values()} == {30, 35, 18}  # of the parameters
    assert cost("trace") == cost("hessian")


def test_memory_of_eigenvalues_is_that_which_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many vectors as it takes to converge, not as may be made."""
    seed()
    monkeypatch.setattr("secorder.oneshot.quantity.TRIAL_SECONDS", 600.0)  # however slow the machine
    model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 3))
    batch = torch.randn(32, 40), torch.arange(32) % 3
    with CurvatureProbe(model) as probe:
        told = probe.estimate_cost(F.cross_entropy, *batch, quantity="eigenvalues").num_bytes
        spent = peak_memory(lambda: probe.hessian_eigenvalues(F.cross_entropy, *batch, generator=seeded()))
    assert told / 1.5 < spent < 1.5 * told


def test_others_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="quantity must be"):
        cost("gradient")
