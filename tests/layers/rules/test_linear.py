"""Layers that multiply their input by a matrix."""

import pytest
import torch
from torch import nn

from .by_sample import assert_exact


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(positions: tuple[int, ...], bias: bool) -> None:
    assert_exact(nn.Linear(4, 3, bias=bias), torch.randn(5, *positions, 4))


@pytest.mark.parametrize("positions", [(), (3,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(positions: tuple[int, ...], bias: bool) -> None:
    assert_exact(nn.Bilinear(3, 2, 4, bias=bias), torch.randn(5, *positions, 3), torch.randn(5, *positions, 2))
