"""What the audit takes for rounding is what rounding can be: no false alarm where sums are long."""

import pytest
import torch
from torch import Tensor, nn

from secorder import CurvatureProbe
from secorder.online.rounding import UNITS, tolerance_of

from ..reference import relative_error


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


@pytest.mark.parametrize(
    ("dtype", "inside"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_parts_that_compute_with_fewer_digits_raise_no_false_alarm(dtype: torch.dtype, inside: torch.dtype) -> None:
    """As norms do that are written by hand for half precision, when the model is run in another one."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(5, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            low = x.to(inside)
            return (low * torch.rsqrt(low.square().mean(-1, keepdim=True)) * (1 + self.weight.to(inside))).to(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Norm(), nn.Linear(5, 2)).to(dtype)
    x, t = torch.randn(8, 4, dtype=dtype), torch.randn(8, 2, dtype=dtype)
    with CurvatureProbe(model, "all", reduction="mean") as probe:
        for _ in range(5):
            nn.functional.mse_loss(model(x), t).backward()
        found, expected = probe.fisher_diagonal(), probe.fisher_diagonal(nn.functional.mse_loss, x, t)
    assert relative_error(found["1"], expected["1"]) < 100 * torch.finfo(inside).eps
