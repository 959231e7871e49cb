"""Traces: the sum of the diagonal, exact or drawn."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import per_layer_fisher_diagonal, per_layer_hessian_diagonal
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.trace import traces

from ..helpers import data, make, measured, mlp, seed, seeded


@pytest.mark.parametrize("by", ["layer", "parameter"])
@pytest.mark.parametrize("of", ["hessian", "ggn", "fisher"])
def test_exact_traces_are_sums_of_diagonals(of: Any, by: Any) -> None:
    model, batch = make(), data()
    found = measured(lambda task: traces(task, Budget("exact"), of=of, by=by), model, batch)
    kinds: Any = {"ggn": "type-2", "fisher": "empirical"}
    diagonal = (
        per_layer_hessian_diagonal(model, F.cross_entropy, *batch, method="exact")
        if of == "hessian"
        else per_layer_fisher_diagonal(model, F.cross_entropy, *batch, fisher_type=kinds[of])
    )
    sums = diagonal if by == "layer" else diagonal.by_parameter()
    assert {name: t.value for name, t in found.items()} == pytest.approx({n: float(v.sum()) for n, v in sums.items()})
    assert all((t.standard_error, t.num_draws, t.converged) == (0.0, 0, True) for t in found.values())


def test_a_ggn_of_many_outputs_is_drawn() -> None:
    """More than are afforded, not by the number of layers."""
    model, batch = make(), data()
    found = [
        measured(lambda task, most=most: traces(task, Budget("auto", 1, max_hvps=most), of="ggn"), model, batch)["0"]
        for most in (2, 3)
    ]
    assert [t.num_draws for t in found] == [1, 0]
    many = measured(lambda task: traces(task, Budget("hutchinson", 2), of="ggn"), model, batch)["0"]
    assert (many.num_draws, many.value) == (0, pytest.approx(found[1].value))  # as many draws as columns: those


def test_an_empirical_fisher_has_one_column() -> None:
    model, batch = mlp(), data()
    drawn = measured(lambda task: traces(task, Budget("hutchinson", 1), of="fisher"), model, batch)
    exact = measured(lambda task: traces(task, Budget("exact"), of="fisher"), model, batch)
    assert drawn == exact


def test_draws_tell_their_number_and_whether_they_sufficed() -> None:
    model, batch = mlp(), data()

    def drawn(budget: Budget, of: Any = "hessian") -> Any:
        return measured(lambda task: traces(task, budget, of=of), model, batch)["0"]

    for of in ("hessian", "ggn"):
        one = drawn(Budget("hutchinson", num_draws=1), of)
        assert (one.num_draws, one.standard_error, one.converged) == (1, torch.inf, False)
    many = drawn(Budget("hutchinson", num_draws=16, rtol=0.02, max_draws=200_000))
    assert many.converged
    assert many.standard_error <= 0.02 * abs(many.value)
    assert many.num_draws > 16


def test_a_drawn_ggn_is_unbiased_and_tells_its_error() -> None:
    """On the outputs, for layers with a rule, for operations and for what is left; the head is exact."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x * self.scale)

    seed()
    model = nn.Sequential(Scaled(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 40))
    batch = torch.randn(5, 4), torch.randint(40, (5,))
    exact = measured(lambda task: traces(task, Budget("exact"), of="ggn", by="parameter"), model, batch)
    draws = [
        measured(
            lambda task: traces(task, Budget("hutchinson", 12), of="ggn", by="parameter"),
            model,
            batch,
            generator=seeded(k),
        )
        for k in range(80)
    ]
    for name, told in exact.items():
        if name.startswith("3"):
            assert draws[0][name].num_draws == 0
            assert draws[0][name].value == pytest.approx(told.value, rel=1e-5)
            continue
        values = torch.tensor([d[name].value for d in draws])
        errors = torch.tensor([d[name].standard_error for d in draws])
        assert {d[name].num_draws for d in draws} == {6}
        assert abs(values.mean() - told.value) < 4 * values.std() / len(draws) ** 0.5
        assert 0.5 < errors.square().mean() / values.var() < 2.0
