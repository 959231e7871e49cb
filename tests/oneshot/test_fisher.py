"""The Monte Carlo Fisher tends to the exact one."""

import pytest
import torch
import torch.nn.functional as F

from secorder import CurvatureProbe, per_layer_fisher_diagonal

from ..helpers import mlp, seeded
from ..reference import assert_all_close

N = 6


@pytest.mark.parametrize("loss", ["convex", "not_convex"])
def test_monte_carlo_fisher_tends_to_type_2(loss: str) -> None:
    loss_fn = F.cross_entropy if loss == "convex" else lambda f, t: torch.sin(3 * f).sum(1).mean()
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    exact = per_layer_fisher_diagonal(model, loss_fn, inputs, targets, fisher_type="type-2")

    def error(draws: int) -> float:
        found = per_layer_fisher_diagonal(
            model, loss_fn, inputs, targets, fisher_type="mc", num_draws=draws, generator=seeded()
        )
        return ((found["0"] - exact["0"]).norm() / exact["0"].norm()).item()

    assert error(4000) < 0.05
    assert error(4000) < error(40) < 0.6


def test_monte_carlo_is_reproducible() -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    with CurvatureProbe(model) as probe:
        first, second = (
            probe.fisher_diagonal(F.cross_entropy, inputs, targets, fisher_type="mc", num_draws=3, generator=seeded(5))
            for _ in range(2)
        )
    assert_all_close(first, second, 0.0)
