"""What the audit takes for rounding is what rounding can be: no false alarm where sums are long."""

import pytest
import torch
from torch import nn

from secorder import CurvatureProbe
from secorder.online.rounding import UNITS, tolerance_of


@pytest.mark.parametrize(("inputs", "outputs"), [(1 << 16, 2), (2, 1 << 16), (1 << 20, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_of_many_random_terms_raise_no_false_alarm(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Of equal inputs, products with random numbers add up like random walks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs)).to(dtype)
    with CurvatureProbe(model, reduction="mean") as probe:
        for _ in range(20):
            model(torch.full((3, inputs), 0.5, dtype=dtype)).square().sum(1).mean().backward()
        assert probe.fisher_diagonal()["0"].isfinite().all()


def test_short_sums_are_held_to_a_few_units() -> None:
    value = torch.zeros((), dtype=torch.float64)
    units = [
        tolerance_of(value, torch.float64, None, ("product",), terms) / torch.finfo(torch.float64).eps
        for terms in (1, 256, 4096)
    ]
    assert units == [UNITS, UNITS, 3 * 64]
