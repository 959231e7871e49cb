"""The numbers that are compared."""

import pytest
from torch import nn

from secorder.online.audit.compared import count_numbers


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (nn.Linear(4, 3), 1),
        (nn.Linear(4, 3, bias=False), 1),
        (nn.Conv2d(2, 3, 2), 1),
        (nn.LayerNorm(4), 2),
        (nn.LSTM(4, 3, bidirectional=True), 8),
        (nn.ConvTranspose1d(3, 2, 2), 2),
        (nn.Linear(4, 3).requires_grad_(False), 0),
    ],
    ids=str,
)
def test_weight_and_bias_are_one(layer: nn.Module, count: int) -> None:
    assert count_numbers(dict(layer.named_parameters())) == count
