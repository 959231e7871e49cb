"""Directions of large curvature taken exactly: unbiased whatever they are, exact where there is nothing else."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secorder.layers.layout import DIM_ZERO
from secorder.oneshot.hessian import output_draws
from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.deflation import Space, deflated, may_pay, pilot
from secorder.oneshot.hessian.estimate import average

from ...helpers import data, seed, seeded
from .strategies import exact, in_z

BUDGET = Budget("hutchinson", num_draws=40)


def space(matrices: Tensor, spent: list[int], chosen: list[Tensor] | None = None) -> Space:
    """Of symmetric matrices (N, D, D), one a sample; values are the diagonals, summed over samples."""
    count, size = matrices.shape[:2]
    generator = seeded()

    def signs(number: int) -> list[Tensor]:
        if chosen is not None:
            return [chosen[0]]
        return [torch.randint(0, 2, (number, count, size), generator=generator).double() * 2 - 1]

    def product(vectors: Sequence[Tensor]) -> list[Tensor]:
        spent.append(len(vectors[0]))
        return [torch.einsum("nij,knj->kni", matrices, vectors[0])]

    return Space(signs, product, lambda u, v: [(u[0] * v[0]).sum(1)], lambda x: x[0], lambda x: [x], 7)


def matrices(rank: int, size: int) -> Tensor:
    """Two symmetric matrices, indefinite, of low rank."""
    factor = torch.randn(2, size, rank, generator=seeded(), dtype=torch.float64)
    return factor @ torch.diag_embed(torch.tensor([1.0, -1.0] * rank, dtype=torch.float64)[:rank]) @ factor.mT


def test_what_lies_in_few_directions_is_exact() -> None:
    """Of each sample its own: together they have more directions than are taken."""
    whole, spent = matrices(8, 64), list[int]()
    where = space(whole, spent)
    tried = pilot(where)
    found = deflated(where, tried, [torch.zeros(64, dtype=torch.float64)], BUDGET, lambda _: None)
    assert found is not None
    draw, values, products = found
    assert (products, sum(spent)) == (20, 4 + 4 + 6 + 10)  # ten directions: pilots, the rest of the sketch, the basis
    assert torch.allclose(values[0], whole.diagonal(dim1=1, dim2=2).sum(0), atol=1e-10)
    assert draw(3)[0].abs().max() < 1e-9
    told = average(draw, [torch.zeros_like(values[0])], BUDGET.fewer(products), 5, lambda _: None, values)
    assert (told.num_draws, told.converged) == (20, True)


def test_draws_beside_any_directions_are_unbiased() -> None:
    """The mean over all random signs that there are, and what the directions give, is the diagonal."""
    size = 8
    whole = matrices(8, size)[:1]
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)), dtype=torch.float64)[:, None]
    where = space(whole, [], [every])
    basis = torch.linalg.qr(torch.randn(1, size, 3, generator=seeded(), dtype=torch.float64))[0]
    rest = where.draw(len(every), basis)[0].mean(0)
    vectors = where.tensors(basis.permute(2, 0, 1))
    inside = where.values(where.product(vectors), vectors)[0].sum(0)
    assert torch.allclose(rest + inside, whole[0].diagonal(), atol=1e-10)


@pytest.mark.parametrize("size", [64, 12])
def test_none_where_curvature_has_no_directions(size: int) -> None:
    where = space(torch.randn(1, size, size, generator=seeded(), dtype=torch.float64), [])
    assert deflated(where, pilot(where), [torch.zeros(size)], BUDGET, lambda _: None) is None
    diagonal = space(torch.diag_embed(torch.ones(1, 64, dtype=torch.float64)), [])
    assert deflated(diagonal, pilot(diagonal), [torch.zeros(64)], BUDGET, lambda _: None) is None


@pytest.mark.parametrize(("draws", "pays"), [(100, True), (40, False)])
def test_many_directions_pay_where_each_takes_little(draws: int, pays: bool) -> None:
    """Of curvature that falls slowly, a few directions leave three quarters: 25 of them pay, ten do not."""
    basis = torch.linalg.qr(torch.randn(2, 200, 200, generator=seeded(), dtype=torch.float64))[0]
    where = space(basis @ torch.diag_embed(0.9 ** torch.arange(200.0).double().expand(2, -1)) @ basis.mT, [])
    for _ in range(5):
        tried, budget = pilot(where), Budget("hutchinson", num_draws=draws)
        found = deflated(where, tried, [torch.zeros(200, dtype=torch.float64)], budget, lambda _: None)
        assert (found is not None) == pays
        if found is not None:
            assert found[0](100)[0].var(0).sum() < where.draw(100)[0].var(0).sum() / 4


def test_what_signs_alone_give_is_left_to_them() -> None:
    """A diagonal, though it falls, and next to nothing beside it."""
    beside = 1e-3 * torch.randn(1, 200, 200, generator=seeded(), dtype=torch.float64)
    where = space(torch.diag_embed(0.9 ** torch.arange(200.0).double())[None] + beside + beside.mT, [])
    how = [torch.zeros(200, dtype=torch.float64)], Budget("hutchinson", num_draws=100), lambda _: None
    assert deflated(where, pilot(where), *how) is None


def test_a_layer_is_deflated_without_bias() -> None:
    """Z-scores of a trace over repetitions have the spread that their errors tell."""
    seed()
    model = nn.Sequential(nn.Linear(4, 48), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    inputs, targets = data(4)
    batch = inputs.double(), targets
    expected = sum(float(part.sum()) for part in exact(model, batch, "0"))
    scores, spent = [], list[int]()

    def run(task: Any, found: Any, graph: Any) -> None:
        graph.layouts = [DIM_ZERO]
        for _ in range(24):
            how = Budget("hutchinson", num_draws=48), 10, spent.append
            _, told = output_draws.run(task, graph, *how, lambda v: [torch.cat(v, 1).sum(1, keepdim=True)])
            scores.append((told.values[0].item() - expected) / told.errors[0].item())
            assert told.num_draws == 24  # a quarter for the sketch, a quarter for its directions

    in_z(run, model, batch, "0")
    z = torch.tensor(scores)
    assert abs(z.mean()) < 4 * len(z) ** -0.5
    assert 0.6 < z.std() < 1.6


def test_few_draws_may_not_pay() -> None:
    assert may_pay(Budget("hutchinson", num_draws=100))
    assert not may_pay(Budget("hutchinson", num_draws=31))
    assert may_pay(Budget("auto", num_draws=16, rtol=0.05))
