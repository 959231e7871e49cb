"""In which dtype curvature is computed."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from secorder.layers.dtypes import MANY_TERMS, added_up, cast, compute_dtype, rounding, zeros
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


@pytest.mark.parametrize("count", [100, 4096])
def test_sums_of_equal_terms_round_more_than_those_of_random_ones(count: int) -> None:
    equal, random = torch.full((count, 1), 0.3), torch.randn(count, 1)
    totals, factors = added_up(torch.cat([equal, -equal, random, 0 * equal], 1))
    assert_close(totals, torch.stack([equal.sum(), -equal.sum(), random.sum(), torch.zeros(())]))
    most = 1 + (count / 64) ** 2 if count > MANY_TERMS else 1.0
    assert_close(factors[:2], torch.full((2,), most))
    assert 1 <= float(factors[2]) < 1 + 20 * (most - 1) / count + 1e-12
    assert float(factors[3]) == 1
