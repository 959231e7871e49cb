"""How exact and how expensive: estimates and their errors, auto, rtol, budgets, costs known before."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, InvalidArgumentError, per_layer_hessian_diagonal

from ...helpers import data, make, mlp, seeded
from ...reference import assert_all_close, hessian_by_element


def test_auto_is_exact_where_it_is_affordable() -> None:
    model, batch = mlp(), data()
    probe = CurvatureProbe(model)
    found = probe.hessian_diagonal(F.cross_entropy, *batch, max_hvps=100)
    assert found.standard_error is None
    assert_all_close(found.by_parameter(), hessian_by_element(model, F.cross_entropy, *batch))


def test_a_budget_turns_layers_into_estimates_and_says_so() -> None:
    model, batch = mlp(), data()
    probe = CurvatureProbe(model)
    exact = hessian_by_element(model, F.cross_entropy, *batch)
    found = probe.hessian_diagonal(F.cross_entropy, *batch, max_hvps=5, generator=seeded())
    assert {name: info.strategy for name, info in found.info.items()} == {
        "0": "output-draws",
        "2": "chain",
        "4": "chain",
    }
    assert found.standard_error is not None
    assert found.info["0"].relative_error <= 0.05
    assert found.info["0"].converged
    assert found.info["2"].num_draws == 0
    assert found.standard_error["2"].abs().max() == 0
    values = found.by_parameter()
    for name in ("2.weight", "4.bias"):
        assert_all_close({name: values[name]}, exact)
    assert (values["0.weight"] - exact["0.weight"]).norm() < 0.2 * exact["0.weight"].norm()


@pytest.mark.parametrize("rtol", [0.2, 0.05])
def test_rtol_draws_until_it_is_met(rtol: float) -> None:
    model, batch = mlp(), data()
    probe = CurvatureProbe(model)
    found = probe.hessian_diagonal(F.cross_entropy, *batch, method="hutchinson", rtol=rtol, generator=seeded())
    exact = hessian_by_element(model, F.cross_entropy, *batch)
    for name, info in found.info.items():
        assert info.converged
        assert info.relative_error <= rtol
        whole = torch.cat([exact[f"{name}.{p}"].flatten() for p in ("weight", "bias")])
        assert (found[name] - whole).norm() < 4 * rtol * whole.norm()


def test_draws_run_out() -> None:
    model, batch = mlp(), data()
    probe = CurvatureProbe(model)
    found = probe.hessian_diagonal(
        F.cross_entropy, *batch, method="hutchinson", rtol=1e-6, max_draws=40, generator=seeded()
    )
    assert not found.info["0"].converged
    assert found.info["0"].num_draws == 40


@pytest.mark.parametrize("max_hvps", [None, 0, 5])
def test_the_cost_is_known_before(max_hvps: int | None) -> None:
    model, batch = mlp(), data()
    probe = CurvatureProbe(model)
    cost = probe.estimate_cost(F.cross_entropy, *batch, max_hvps=max_hvps, num_draws=7)
    found = probe.hessian_diagonal(F.cross_entropy, *batch, max_hvps=max_hvps, num_draws=7)
    for name, info in found.info.items():
        assert info.strategy == cost[name].strategy
        assert cost[name].num_bytes > 0
        assert info.num_hvps >= cost[name].num_hvps
        assert info.num_hvps - cost[name].num_hvps <= 12  # the checks
    assert cost["0"].exact_hvps == 6


@pytest.mark.parametrize(
    "options",
    [
        {"method": "guess"},
        {"rtol": 0.0},
        {"method": "exact", "max_hvps": 3},
        {"max_hvps": -1},
        {"num_draws": 50, "max_draws": 10},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        CurvatureProbe(mlp()).hessian_diagonal(F.cross_entropy, *data(), **options)


class Decoder(nn.Module):
    """Embedding, one attention block, a head over a large vocabulary."""

    def __init__(self, vocabulary: int, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(x)


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def test_large_vocabulary_is_estimated_in_bounded_memory() -> None:
    import resource

    torch.set_default_dtype(torch.float32)
    model, tokens = Decoder(16_000), torch.randint(16_000, (2, 64))
    probe = CurvatureProbe(model, "all")
    cost = probe.estimate_cost(next_token, tokens, tokens, num_draws=2)
    assert {c.strategy for c in cost.values()} <= {"column-draws", "output-draws", "parameter-basis", "columns"}
    assert cost["embed"].strategy == "output-draws"
    assert (cost["head"].strategy, cost["head"].num_hvps) == ("columns", 0)  # its output is the model's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = probe.hessian_diagonal(next_token, tokens, tokens, num_draws=2)
    assert found.standard_error is not None
    assert all(d.isfinite().all() for d in (*found.values(), *found.standard_error.values()))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


N = 6


def cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))


def coupled() -> nn.Sequential:
    return make(nn.BatchNorm1d(5), nn.Tanh())


CASES = {"mlp": (mlp, (4,)), "cnn": (cnn, (1, 6, 6)), "batch_norm": (coupled, (4,))}


@pytest.mark.parametrize("case", CASES)
def test_hutchinson_is_within_its_standard_error(case: str) -> None:
    build, shape = CASES[case]
    model, inputs, targets = build(), torch.randn(N, *shape), torch.randint(3, (N,))
    exact = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="exact")
    found = per_layer_hessian_diagonal(
        model, F.cross_entropy, inputs, targets, method="hutchinson", num_draws=400, generator=seeded()
    )
    assert found.standard_error is not None
    ways = {info.strategy for info in found.info.values()}
    assert ("parameter-draws" in ways) == (case == "batch_norm")
    for name, value in found.items():
        error = found.standard_error[name]
        assert error.shape == value.shape
        scores = ((value - exact[name]) / error.clamp_min(1e-12))[error > 1e-12]
        assert len(scores) or found.info[name].strategy.startswith("columns")  # no error: exact in every draw
        assert not len(scores) or 0.5 < scores.square().mean().sqrt() < 1.6
        # Entries that every draw gives exactly have no error to report.
        assert torch.allclose(value[error <= 1e-12], exact[name][error <= 1e-12], atol=1e-12)


def test_hutchinson_error_falls_with_the_draws() -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))

    def error(draws: int) -> float:
        found = per_layer_hessian_diagonal(
            model, F.cross_entropy, inputs, targets, method="hutchinson", num_draws=draws, generator=seeded()
        )
        return found.standard_error["0"].mean().item()

    assert 3.0 < error(50) / error(800) < 5.0


def test_one_draw_has_no_standard_error() -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    found = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="hutchinson", num_draws=1)
    assert torch.isinf(found.standard_error["0"]).all()


@pytest.mark.parametrize("case", CASES)
def test_same_generator_same_numbers(case: str) -> None:
    build, shape = CASES[case]
    model, inputs, targets = build(), torch.randn(N, *shape), torch.randint(3, (N,))

    def run(seed: int) -> dict[str, torch.Tensor]:
        return per_layer_hessian_diagonal(
            model, F.cross_entropy, inputs, targets, method="hutchinson", num_draws=5, generator=seeded(seed)
        )

    assert_all_close(run(1), run(1), 0.0)
    assert not torch.equal(run(1)["0"], run(2)["0"])


def test_without_a_generator_draws_differ_and_the_global_state_stays() -> None:
    model, inputs, targets = mlp(), torch.randn(N, 4), torch.randint(3, (N,))
    before = torch.get_rng_state()
    first, second = (
        per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="hutchinson", num_draws=2)
        for _ in range(2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first["0"], second["0"])


def test_coupled_samples_stay_exact() -> None:
    model, inputs, targets = coupled(), torch.randn(N, 4), torch.randint(3, (N,))
    found = per_layer_hessian_diagonal(model, F.cross_entropy, inputs, targets, method="exact")
    assert found.info["0"].strategy == "parameter-basis"
    assert not found.info["0"].checks["samples_independent"]
    assert_all_close(found.by_parameter(), hessian_by_element(model, F.cross_entropy, inputs, targets))


@pytest.mark.parametrize("count", [1, 4])
def test_a_narrow_layer_before_a_head_that_needs_no_product(count: int) -> None:
    """Its basis is cheaper than columns: the gradients have to be differentiable for it alone."""
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 3))
    x, y = torch.randn(count, 2), torch.randn(count, 3)
    nn.init.constant_(model[0].bias, 5.0)
    found = per_layer_hessian_diagonal(model, nn.MSELoss(), x, y, method="exact").by_parameter()
    assert_all_close(found, hessian_by_element(model, nn.MSELoss(), x, y))
    assert found["0.bias"].abs() > 0
