"""Random signs on the parameters: unbiased for any layer."""

import pytest
from torch import nn

from secorder import AttributionError
from secorder.oneshot.hessian import parameter_draws
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.facts import Facts

from ...helpers import Clamped, Fn, Twice, data, make, mlp
from .strategies import exact, on_theta

DRAWS = Budget("hutchinson", num_draws=500)


@pytest.mark.parametrize(("build", "layer"), [(mlp, "2"), (Twice, "a")])
def test_the_mean_is_the_diagonal_to_its_standard_error(build, layer: str) -> None:  # type: ignore[no-untyped-def]
    model, batch, told = build(), data(), []

    def run(task, own, gradients):  # type: ignore[no-untyped-def]
        return parameter_draws.run(task, own, gradients, DRAWS, 10, told.append, lambda values: values)

    estimate = on_theta(run, model, batch, layer)
    for value, error, expected in zip(estimate.values, estimate.errors, exact(model, batch, layer), strict=True):
        assert ((value - expected).abs() < 5 * error).all()
    assert sum(told) == estimate.num_draws == 500


def test_no_mean_of_draws_is_told_where_products_are_not_linear() -> None:
    """But where they are to rounding: that of a bias which a normalisation takes off is nothing else."""

    def run(task, own, gradients):  # type: ignore[no-untyped-def]
        return parameter_draws.run(task, own, gradients, DRAWS, 10, lambda _: None, lambda values: values)

    with pytest.raises(AttributionError, match=r"hook that clamps.*method=\"exact\""):
        on_theta(run, make(nn.Tanh(), Fn(lambda x: 10 * x), Fn(Clamped.apply)), data(), "0")
    assert on_theta(run, make(nn.BatchNorm1d(5), nn.Tanh()), data(), "0").num_draws == 500


def test_it_applies_everywhere() -> None:
    facts = Facts("0", 30, own_use=False, samples_independent=False)
    assert parameter_draws.applies(facts)
    assert parameter_draws.products(facts, DRAWS) == 500
