"""The heaviest columns of each sample, and the rest by random signs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, InvalidArgumentError
from secorder._torch.vjp import gradients
from secorder.oneshot.heaviest import by_weight, forecast, heaviest
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.output_root import output_root
from secorder.oneshot.roots import Columns, Draws

from ..helpers import seeded
from ..reference import assert_all_close, ggn_by_sample

N, C = 6, 60


def classifier() -> nn.Sequential:
    """Sure of few of its classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, C))
    with torch.no_grad():
        model[2].weight.mul_(12)
    return model


X, Y = torch.randn(N, 4, generator=seeded(), dtype=torch.float64), torch.arange(N) % C


def weighted(f: Tensor, t: Any) -> Tensor:
    """Positive and negative weights of samples."""
    return (t[1] * F.cross_entropy(f, t[0], reduction="none")).sum()


@pytest.mark.parametrize("signed", [False, True])
def test_columns_by_falling_weight_and_the_rest_make_the_hessian(signed: bool) -> None:
    f = (4 * torch.randn(N, C, generator=seeded())).requires_grad_()
    signs = torch.tensor([1.0, -1.0] * (N // 2)) if signed else torch.ones(N)
    root = output_root(gradients(weighted(f, (Y, signs)), [f], create_graph=True), [f])
    some = heaviest(root, 0.05)
    assert root.weights is not None
    weights = root.weights()
    every = root.columns(range(root.num_columns))
    torch.testing.assert_close(weights, every.u.square().sum(2).T)
    assert some.num_columns < C / 2
    kept = weights.gather(1, some.order)
    assert (kept[:, :-1] >= kept[:, 1:]).all()
    assert weights.sum() - kept.sum() <= 0.05 * weights.sum() < weights.sum() - kept[:, :-1].sum()
    pairs = some.columns(range(some.num_columns))
    draws = Draws.of(root, 5000, seeded(), without=some.order).columns(range(5000))

    def product(u: Tensor, v: Tensor | None, sign: Tensor | None) -> Tensor:
        other = u if v is None else v
        return torch.einsum("kni,knj->nij", u if sign is None else u * sign[..., None], other)

    whole = product(every.u, every.v, every.sign)
    exact = product(pairs.u, pairs.v, pairs.sign)
    rest = product(draws.u, draws.v, draws.sign)
    assert (exact - whole).norm() > 0
    assert (exact + rest - whole).norm() < 0.1 * (exact - whole).norm() + 1e-12


@pytest.mark.parametrize("rtol", [0.3, 0.03])
def test_the_fisher_of_many_classes(rtol: float) -> None:
    model = classifier()
    expected = ggn_by_sample(model, F.cross_entropy, X, Y)
    with CurvatureProbe(model) as probe:
        found = [
            probe.fisher_diagonal(F.cross_entropy, X, Y, fisher_type="type-2", rtol=rtol, generator=seeded(k))
            for k in range(60)
        ]
    assert_all_close({k: v for k, v in found[0].by_parameter().items() if k.startswith("2")}, expected)
    name = "0"
    exact = torch.cat([expected["0.weight"].flatten(), expected["0.bias"]])
    drawn = found[0].info[name]
    assert 0 < drawn.num_draws < C
    assert drawn.converged
    assert drawn.relative_error <= rtol
    values = torch.stack([d[name] for d in found])
    errors = torch.stack([d.standard_error[name] for d in found])  # type: ignore[index]
    live = errors.mean(0) > 1e-9 * exact.abs().max()
    z = ((values.mean(0) - exact) / (values.std(0) / len(values) ** 0.5))[live]
    assert z.square().mean() < 2.5  # unbiased
    ratio = (errors.square().mean(0) / values.var(0))[live]
    assert 0.6 < ratio.median() < 1.7  # and the error is as told


def test_columns_without_weights_are_drawn_and_so_forecast() -> None:
    f = torch.randn(N, 400, generator=seeded()).requires_grad_()
    loss = F.mse_loss(f.sigmoid(), torch.zeros_like(f))
    root = replace(output_root(gradients(loss, [f], create_graph=True), [f]), weights=None)
    made: list[int] = []

    def contract(columns: Columns) -> list[list[Tensor]]:
        made.append(columns.num_columns)
        pairs = columns.columns(range(columns.num_columns))
        values = pairs.u.sum(2).square() if pairs.sign is None else pairs.sign * pairs.u.sum(2).square()
        return [[values.sum()[None]]]

    budget = Budget.checked("hutchinson", None, 0.5, None, None)
    told = forecast(root, budget, contract, seeded())
    made.clear()
    by_weight(root, budget, contract, seeded())
    assert sum(made) < 400
    assert told.columns < 400


def test_few_columns_are_exact_and_other_layers_too() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 5))
    with CurvatureProbe(model, "all") as probe:
        found = probe.fisher_diagonal(F.cross_entropy, X, Y % 5, fisher_type="type-2", rtol=0.1)
    assert found.standard_error is None
    assert_all_close(found.by_parameter(), ggn_by_sample(model, F.cross_entropy, X, Y % 5))


def test_misuse() -> None:
    with CurvatureProbe(classifier()) as probe:
        for options in ({"fisher_type": "mc"}, {}, {"fisher_type": "type-2", "create_graph": True}):
            with pytest.raises(InvalidArgumentError, match="rtol goes with"):
                probe.fisher_diagonal(F.cross_entropy, X, Y, rtol=0.1, **options)
