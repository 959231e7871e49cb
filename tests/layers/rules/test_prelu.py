"""Activations with a slope that is learnt."""

import pytest
import torch
from torch import nn

from .by_sample import assert_exact


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("slopes", [1, 4])
def test_prelu(slopes: int, positions: tuple[int, ...]) -> None:
    assert_exact(nn.PReLU(slopes), torch.randn(5, 4, *positions))
