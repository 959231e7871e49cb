"""Traces and eigenvalues against dense blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secorder import CurvatureProbe, InvalidArgumentError

from ..helpers import Twice, data, make, mlp, seeded

N = 6


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
    return make(nn.BatchNorm1d(5), nn.Tanh())


MODELS = {"mlp": (mlp, (4,)), "relu_cnn": (relu_cnn, (1, 3, 3)), "coupled": (coupled, (4,)), "twice": (Twice, (4,))}


@pytest.mark.parametrize("name", MODELS)
def test_trace_against_dense_blocks(name: str) -> None:
    build, shape = MODELS[name]
    model, inputs, targets = build(), torch.randn(N, *shape), torch.randint(3, (N,))
    dense = blocks(model, F.cross_entropy, inputs, targets)
    probe = CurvatureProbe(model)
    found = probe.hessian_trace(F.cross_entropy, inputs, targets, num_draws=300, generator=seeded())
    for layer, trace in found.items():
        true = dense[layer].trace().item()
        if trace.standard_error == 0 or trace.num_draws == 0:
            assert trace.value == pytest.approx(true, rel=1e-9)
        else:
            assert abs(trace.value - true) < 4 * trace.standard_error + 1e-9
            assert trace.standard_error < 0.5 * abs(true) + 0.1
    close = probe.hessian_trace(F.cross_entropy, inputs, targets, rtol=0.2, max_draws=5_000)
    for layer, trace in close.items():
        assert trace.converged == (trace.standard_error <= 0.2 * abs(trace.value))
        assert trace.converged or trace.num_draws == 5_000  # a trace of about zero has no relative error
        assert abs(trace.value - dense[layer].trace().item()) < 5 * trace.standard_error + 1e-9


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 3])
def test_eigenvalues_against_dense_blocks(name: str, count: int) -> None:
    build, shape = MODELS[name]
    model, inputs, targets = build(), torch.randn(N, *shape), torch.randint(3, (N,))
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
