"""Draws on the outputs: unbiased, and better than draws on the parameters."""

from typing import Any

import pytest
import torch

from secorder.layers.layout import DIM_ZERO
from secorder.oneshot.hessian import output_draws, parameter_draws
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.facts import Facts

from ...helpers import data, mlp
from .strategies import exact, in_z, on_theta

DRAWS = Budget("hutchinson", num_draws=400)


def nothing(_: int) -> None:
    """No bar."""


def drawn(model: Any, batch: Any, rest: bool = False) -> Any:
    def run(task: Any, found: Any, graph: Any) -> Any:
        graph.layouts = [DIM_ZERO]
        known = [torch.zeros(24), torch.zeros(6)] if rest else []
        return output_draws.run(task, graph, DRAWS, 10, nothing, lambda values: values, known)

    return in_z(run, model, batch, "0")


def test_the_mean_is_the_diagonal_to_its_standard_error() -> None:
    model, batch = mlp(), data()
    strategy, estimate = drawn(model, batch)
    assert (strategy, estimate.num_draws) == (output_draws.NAME, 400)
    for value, error, expected in zip(estimate.values, estimate.errors, exact(model, batch, "0"), strict=True):
        assert ((value - expected).abs() < 5 * error).all()
    by_parameters = on_theta(
        lambda task, layer, own: parameter_draws.run(task, layer, own, DRAWS, 10, nothing, lambda values: values),
        model,
        batch,
        "0",
    )
    assert estimate.errors[0].norm() < by_parameters.errors[0].norm()


@pytest.mark.parametrize("name", ["own_use", "samples_independent", "outputs"])
def test_it_applies_where_samples_do_not_interact(name: str) -> None:
    facts: dict[str, Any] = {"own_use": True, "samples_independent": True, "outputs": 6}
    assert output_draws.applies(Facts("0", 30, **facts))
    assert not output_draws.applies(Facts("0", 30, **{**facts, name: 0}))
    assert output_draws.products(Facts("0", 30, **facts), DRAWS) == 400
