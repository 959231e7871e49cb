"""How exact and how expensive: auto, rtol, budgets, costs known before, traces, eigenvalues, large outputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, InvalidArgumentError

from .reference import assert_all_close, hessian_by_element

N = 6


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4), torch.randint(3, (N,))


def test_auto_is_exact_where_it_is_affordable() -> None:
    model, batch = mlp(), data()
    probe = CurvatureProbe(model)
    found = probe.hessian_diagonal(F.cross_entropy, *batch)
    assert found.standard_error is None
    assert_all_close(found.by_parameter(), hessian_by_element(model, F.cross_entropy, *batch))


def test_a_budget_turns_layers_into_estimates_and_says_so() -> None:
    model, batch = mlp(), data()
    probe = CurvatureProbe(model)
    exact = hessian_by_element(model, F.cross_entropy, *batch)
    found = probe.hessian_diagonal(F.cross_entropy, *batch, max_hvps=5, generator=seeded())
    assert {name: info.way for name, info in found.info.items()} == {"0": "z-draws", "2": "z-basis", "4": "columns"}
    assert found.standard_error is not None
    assert found.info["0"].relative_error <= 0.05
    assert found.info["0"].converged
    assert found.info["2"].num_samples == 0
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
        F.cross_entropy, *batch, method="hutchinson", rtol=1e-6, max_num_samples=40, generator=seeded()
    )
    assert not found.info["0"].converged
    assert found.info["0"].num_samples == 40


@pytest.mark.parametrize("max_hvps", [None, 0, 5])
def test_the_cost_is_known_before(max_hvps: int | None) -> None:
    model, batch = mlp(), data()
    probe = CurvatureProbe(model)
    cost = probe.estimate_cost(F.cross_entropy, *batch, max_hvps=max_hvps, num_samples=7)
    found = probe.hessian_diagonal(F.cross_entropy, *batch, max_hvps=max_hvps, num_samples=7)
    for name, info in found.info.items():
        assert info.way == cost[name].way
        assert cost[name].bytes > 0
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
        {"num_samples": 50, "max_num_samples": 10},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        CurvatureProbe(mlp()).hessian_diagonal(F.cross_entropy, *data(), **options)


# ---- traces and eigenvalues


def blocks(model: nn.Module, loss_fn: Any, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Each layer's dense Hessian block, weight then bias."""
    result = {}
    for path, layer in model.named_modules():
        parameters = list(layer.parameters(recurse=False))
        if not parameters:
            continue
        loss = loss_fn(model(inputs), targets)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in gradient]
        result[path] = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
    return result


def relu_cnn() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))


def coupled() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


MODELS = {"mlp": (mlp, (4,)), "relu_cnn": (relu_cnn, (1, 3, 3)), "coupled": (coupled, (4,)), "twice": (Twice, (4,))}


@pytest.mark.parametrize("name", MODELS)
def test_trace_against_dense_blocks(name: str) -> None:
    make, shape = MODELS[name]
    model, inputs, targets = make(), torch.randn(N, *shape), torch.randint(3, (N,))
    dense = blocks(model, F.cross_entropy, inputs, targets)
    probe = CurvatureProbe(model)
    found = probe.hessian_trace(F.cross_entropy, inputs, targets, num_samples=300, generator=seeded())
    for layer, trace in found.items():
        true = dense[layer].trace().item()
        if trace.standard_error == 0 or trace.num_samples == 0:
            assert trace.value == pytest.approx(true, rel=1e-9)
        else:
            assert abs(trace.value - true) < 4 * trace.standard_error + 1e-9
            assert trace.standard_error < 0.5 * abs(true) + 0.1
    close = probe.hessian_trace(F.cross_entropy, inputs, targets, rtol=0.2, max_num_samples=5_000)
    for layer, trace in close.items():
        assert trace.converged == (trace.standard_error <= 0.2 * abs(trace.value))
        assert trace.converged or trace.num_samples == 5_000  # a trace of about zero has no relative error
        assert abs(trace.value - dense[layer].trace().item()) < 5 * trace.standard_error + 1e-9


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 3])
def test_eigenvalues_against_dense_blocks(name: str, count: int) -> None:
    make, shape = MODELS[name]
    model, inputs, targets = make(), torch.randn(N, *shape), torch.randint(3, (N,))
    dense = blocks(model, F.cross_entropy, inputs, targets)
    probe = CurvatureProbe(model)
    found = probe.hessian_eigenvalues(
        F.cross_entropy, inputs, targets, count=count, tolerance=1e-10, generator=seeded()
    )
    for layer, values in found.items():
        true = torch.linalg.eigvalsh(dense[layer])
        assert values.converged
        assert len(values.top) == len(values.bottom) == count
        # A Krylov space holds a multiple eigenvalue (zero, here) once.
        distinct = true[torch.cat([torch.tensor([True]), true.diff() > 1e-9])]
        assert values.top == pytest.approx(distinct[-count:].flip(0).tolist(), rel=1e-7, abs=1e-9)
        assert values.bottom == pytest.approx(distinct[:count].tolist(), rel=1e-7, abs=1e-9)


def test_eigenvalues_say_when_they_are_not_there_yet() -> None:
    probe = CurvatureProbe(mlp())
    found = probe.hessian_eigenvalues(F.cross_entropy, *data(), tolerance=1e-12, max_iterations=3)
    assert not found["2"].converged
    assert found["2"].num_hvps == 3
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        probe.hessian_eigenvalues(F.cross_entropy, *data(), count=0)


# ---- large outputs


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
    model, tokens = Decoder(32_000), torch.randint(32_000, (2, 64))
    probe = CurvatureProbe(model, "all")
    cost = probe.estimate_cost(next_token, tokens, tokens, num_samples=2)
    assert {c.way for c in cost.values()} <= {"z-draws", "parameter-basis"}
    assert cost["head"].way == cost["embed"].way == "z-draws"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = probe.hessian_diagonal(next_token, tokens, tokens, num_samples=2)
    assert found.standard_error is not None
    assert all(d.isfinite().all() for d in (*found.values(), *found.standard_error.values()))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # kB
