"""Estimates are unbiased, their standard errors true, and both reproducible from a generator."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secorder import CurvatureProbe, per_layer_fisher_diagonal, per_layer_hessian_diagonal

from .reference import assert_all_close, hessian_by_element

N = 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))


def coupled() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


CASES = {"mlp": (mlp, (4,)), "cnn": (cnn, (1, 6, 6)), "batch_norm": (coupled, (4,))}


@pytest.mark.parametrize("case", CASES)
def test_hutchinson_is_within_its_standard_error(case: str) -> None:
    make, shape = CASES[case]
    model, inputs, targets = make(), torch.randn(N, *shape), torch.randint(3, (N,))
    exact = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets)
    found = per_layer_hessian_diagonal(
        model, F.cross_entropy, inputs, targets, method="hutchinson", num_samples=400, generator=seeded()
    )
    assert found.standard_error is not None
    ways = {info.way for info in found.info.values()}
    assert ("parameter-draws" in ways) == (case == "batch_norm")
    for name, value in found.items():
        error = found.standard_error[name]
        assert error.shape == value.shape
        scores = ((value - exact[name]) / error.clamp_min(1e-12))[error > 1e-12]
        assert len(scores) or found.info[name].way.startswith("columns")  # no error: exact in every draw
        assert not len(scores) or 0.5 < scores.square().mean().sqrt() < 1.6
        # Entries that every draw gives exactly have no error to report.
        assert torch.allclose(value[error <= 1e-12], exact[name][error <= 1e-12], atol=1e-12)


def test_hutchinson_error_falls_with_the_draws() -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))

    def error(draws: int) -> float:
        found = per_layer_hessian_diagonal(
            model, F.cross_entropy, inputs, targets, method="hutchinson", num_samples=draws, generator=seeded()
        )
        return found.standard_error["0"].mean().item()

    assert 3.0 < error(50) / error(800) < 5.0


def test_one_draw_has_no_standard_error() -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    found = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="hutchinson", num_samples=1)
    assert torch.isinf(found.standard_error["0"]).all()


@pytest.mark.parametrize("case", CASES)
def test_same_generator_same_numbers(case: str) -> None:
    make, shape = CASES[case]
    model, inputs, targets = make(), torch.randn(N, *shape), torch.randint(3, (N,))

    def run(seed: int) -> dict[str, torch.Tensor]:
        return per_layer_hessian_diagonal(
            model, F.cross_entropy, inputs, targets, method="hutchinson", num_samples=5, generator=seeded(seed)
        )

    assert_all_close(run(1), run(1), 0.0)
    assert not torch.equal(run(1)["0"], run(2)["0"])


def test_without_a_generator_draws_differ_and_the_global_state_stays() -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    before = torch.get_rng_state()
    first, second = (
        per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="hutchinson", num_samples=2)
        for _ in range(2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first["0"], second["0"])


@pytest.mark.parametrize("loss", ["convex", "not_convex"])
def test_monte_carlo_fisher_tends_to_type_2(loss: str) -> None:
    loss_fn = F.cross_entropy if loss == "convex" else lambda f, t: torch.sin(3 * f).sum(1).mean()
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    exact = per_layer_fisher_diagonal(model, loss_fn, inputs, targets, fisher_type="type-2")

    def error(draws: int) -> float:
        found = per_layer_fisher_diagonal(
            model, loss_fn, inputs, targets, fisher_type="mc", num_samples=draws, generator=seeded()
        )
        return ((found["0"] - exact["0"]).norm() / exact["0"].norm()).item()

    assert error(4000) < 0.05
    assert error(4000) < error(40) < 0.6


def test_monte_carlo_is_reproducible() -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    with CurvatureProbe(model) as probe:
        first, second = (
            probe.fisher_diagonal(
                F.cross_entropy, inputs, targets, fisher_type="mc", num_samples=3, generator=seeded(5)
            )
            for _ in range(2)
        )
    assert_all_close(first, second, 0.0)


def test_coupled_samples_stay_exact() -> None:
    model, inputs, targets = coupled(), torch.randn(N, 4), torch.randint(3, (N,))
    found = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets)
    assert found.info["0"].way == "parameter-basis"
    assert not found.info["0"].checks["samples_independent"]
    assert_all_close(found.by_parameter(), hessian_by_element(model, F.cross_entropy, inputs, targets))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, progress=True)
    assert "Hessian" in capsys.readouterr().out
    per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets)
    assert capsys.readouterr().out == ""
