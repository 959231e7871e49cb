"""Means of draws, and how long they are drawn."""

import pytest
import torch
from torch import Tensor

from secorder.oneshot.hessian.budget import Budget
from secorder.oneshot.hessian.estimate import Draw, Estimate, average
from secorder.results import relative_error

from ...helpers import seeded


def stream(spread: float) -> tuple[Draw, Tensor]:
    """Draws of the numbers 1, 2, 3 with a spread, and all that there will be."""
    values = torch.tensor([1.0, 2.0, 3.0]) + spread * torch.randn(5000, 3, generator=seeded())
    position = [0]

    def draw(count: int) -> list[Tensor]:
        position[0] += count
        return [values[position[0] - count : position[0]]]

    return draw, values


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_mean_and_standard_error_whatever_the_chunk(size: int) -> None:
    draw, values = stream(0.5)
    told: list[int] = []
    found = average(draw, [torch.zeros(3)], Budget("hutchinson", num_draws=100), size, told.append)
    assert torch.allclose(found.values[0], values[:100].mean(0))
    assert torch.allclose(found.errors[0], values[:100].std(0) / 10)
    assert sum(told) == found.num_draws == 100


def test_it_draws_until_the_error_is_small_enough_or_no_more_may_be_drawn() -> None:
    for most, converged in ((5000, True), (60, False)):
        draw, _ = stream(2.0)
        budget = Budget("hutchinson", num_draws=16, rtol=0.05, max_draws=most)
        found = average(draw, [torch.zeros(3)], budget, 50, lambda _: None)
        assert found.converged is converged
        assert (found.relative_error <= 0.05) is converged
        assert 16 < found.num_draws <= most


def test_what_is_known_is_added_and_one_draw_tells_nothing_of_its_error() -> None:
    draw, values = stream(0.1)
    found = average(draw, [torch.zeros(3)], Budget("hutchinson", num_draws=1), 1, lambda _: None, [torch.ones(3)])
    assert torch.allclose(found.values[0], values[0] + 1)
    assert found.errors[0].isinf().all()
    assert not found.converged


def test_relative_errors() -> None:
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0
    assert relative_error([torch.zeros(2)], [torch.ones(2)]) == torch.inf
    assert relative_error([torch.tensor([3.0]), torch.tensor([4.0])], [torch.ones(1)]) == pytest.approx(0.2)
    assert Estimate([torch.ones(1)]).relative_error == 0
