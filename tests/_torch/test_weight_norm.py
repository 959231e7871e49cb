"""PyTorch's weight normalisation."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from secorder._torch.weight_norm import second_derivative_is_exact, weight_normalised


@pytest.mark.parametrize(("dim", "expected"), [(0, True), (1, True), (None, False)])
def test_layers_whose_weights_are_normalised_by_the_kernel(dim: Any, expected: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(3, 2), dim=dim)
    assert [weight_normalised(layer) for layer in (old, weight_norm(nn.Linear(3, 2), dim=dim))] == [expected] * 2
    assert not weight_normalised(nn.Linear(3, 2))


def test_a_second_derivative_by_differences() -> None:
    """The one that PyTorch gives is within rounding of the differences of its first ones, or is said not to be."""
    v, g = torch.tensor([[0.3, -1.2, 0.7]], requires_grad=True), torch.tensor([[1.5]])

    def slope(v: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(torch._weight_norm(v, g, 0)[0, 1], v, create_graph=True)[0][0, 1]

    step = 1e-6 * torch.tensor([[0.0, 1.0, 0.0]])
    difference = (slope(v + step) - slope(v - step)) / 2e-6
    (told,) = torch.autograd.grad(slope(v), v)
    assert second_derivative_is_exact() == torch.allclose(told[0, 1], difference, atol=1e-6)
