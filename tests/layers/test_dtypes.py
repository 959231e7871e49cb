"""In which dtype curvature is computed."""

import pytest
import torch
from torch import nn

from secorder.layers.dtypes import cast, compute_dtype, rounding, zeros
from secorder.layers.selection import select_layers


@pytest.mark.parametrize(
    ("own", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_computed_in_single(own: torch.dtype, computed: torch.dtype) -> None:
    (layer,) = select_layers(nn.Linear(3, 2, dtype=own))
    assert compute_dtype(layer) is computed
    parts = zeros(layer)
    assert [(part.shape, part.dtype, part.count_nonzero().item()) for part in parts] == [
        ((6,), computed, 0),
        ((2,), computed, 0),
    ]


def test_the_widest_of_a_layers_parameters_counts() -> None:
    layer = nn.Linear(3, 2, dtype=torch.float16)
    layer.bias = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    assert compute_dtype(select_layers(layer)[0]) is torch.float64


def test_indices_are_not_cast() -> None:
    ids = torch.arange(3)
    assert cast(ids, torch.float64) is ids
    assert cast(torch.zeros(3, dtype=torch.float32), torch.float64).dtype is torch.float64


def test_rounding_is_coarse_where_numbers_are() -> None:
    assert rounding(torch.float64) == 1024 * 2.0**-52
    assert rounding(torch.float32) == 1024 * 2.0**-23
    assert rounding(torch.bfloat16) == 1 / 16
