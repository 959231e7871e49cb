"""Estimates are unbiased, and their standard errors are what they say."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe

from ..helpers import make, mlp, seed, seeded

#: How often an estimate is repeated: the more, the smaller a bias that is seen.
REPETITIONS = [75, pytest.param(400, marks=pytest.mark.slow)]


def z_scores(estimates: Tensor, errors: Tensor, exact: Tensor) -> Tensor:
    return ((estimates - exact) / errors)[errors > 1e-9 * exact.abs().max()]


def assert_standard_normal(z: Tensor) -> None:
    """Mean zero, variance one, within four standard errors of either; tails as those of few dozen draws may be."""
    count = len(z)
    assert abs(z.mean().item()) < 4 / count**0.5
    assert abs(z.var().item() - 1) < 4 * (2 / count) ** 0.5 + 0.1
    assert (z.abs() > 3).double().mean().item() < 0.02


MODELS = {"z": mlp, "parameters": lambda: make(nn.BatchNorm1d(5), nn.Tanh())}


@pytest.mark.parametrize("repetitions", REPETITIONS)
@pytest.mark.parametrize("name", MODELS)
def test_diagonal(name: str, repetitions: int) -> None:
    """One entry of the first layer and the sum of one: whole repetitions are independent."""
    model, x, y = MODELS[name](), torch.randn(6, 4), torch.randint(3, (6,))
    with CurvatureProbe(model, layers="0") as probe:
        exact = probe.hessian_diagonal(F.cross_entropy, x, y, method="exact")["0"]
        entry = exact.abs().argmax()
        found = [
            probe.hessian_diagonal(F.cross_entropy, x, y, method="hutchinson", num_draws=60, generator=seeded(1000 + k))
            for k in range(repetitions)
        ]
    kind = "output-draws" if name == "z" else "parameter-draws"
    assert all(kind in d.info["0"].strategy for d in found)
    values = torch.stack([d["0"][entry] for d in found])
    errors = torch.stack([d.standard_error["0"][entry] for d in found])  # type: ignore[index]
    assert_standard_normal(z_scores(values, errors, exact[entry]))


@pytest.mark.parametrize("repetitions", REPETITIONS)
@pytest.mark.parametrize("of", ["hessian", "ggn"])
def test_trace(of: Any, repetitions: int) -> None:
    """Of the GGN with more classes than draws; with fewer it is exact, as the empirical Fisher's always is."""
    seed()
    many = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 90))
    model, x, y = mlp() if of == "hessian" else many, torch.randn(6, 4), torch.randint(3, (6,))
    with CurvatureProbe(model, layers="0") as probe:
        exact = probe.hessian_trace(F.cross_entropy, x, y, of=of, method="exact")["0"].value
        found = [
            probe.hessian_trace(
                F.cross_entropy, x, y, of=of, method="hutchinson", num_draws=60, generator=seeded(1000 + k)
            )["0"]
            for k in range(repetitions)
        ]
    z = [(t.value - exact) / t.standard_error for t in found]
    assert_standard_normal(torch.tensor(z, dtype=torch.float64))
