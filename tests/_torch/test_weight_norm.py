"""PyTorch's weight normalisation, differentiated twice."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from secorder import per_layer_fisher_diagonal, per_layer_hessian_diagonal
from secorder._torch import weight_norm as ours
from secorder._torch.weight_norm import differentiable_weight_norm

from ..helpers import no_warnings


def by_hook(layer: nn.Module, dim: int | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return nn.utils.weight_norm(layer, dim=dim)


def by_parametrization(layer: nn.Module, dim: int | None) -> nn.Module:
    return weight_norm(layer, dim=dim)  # type: ignore[arg-type]


WAYS = pytest.mark.parametrize("normalise", [by_hook, by_parametrization])
DIMS = pytest.mark.parametrize("dim", [0, 1, 2, -1, None])


@WAYS
@DIMS
def test_weights_are_those_of_pytorch_in_any_dtype(normalise: Callable[..., nn.Module], dim: int | None) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        layer = normalise(nn.Conv1d(3, 2, 2), dim).to(dtype)
        one = torch.eye(6, dtype=dtype).view(6, 3, 2)  # of which each output is one weight and the bias
        expected = layer(one)
        with differentiable_weight_norm(layer.modules()):
            found = layer(one)
        torch.testing.assert_close(found, expected)


def test_others_run_as_they_are() -> None:
    calls: list[object] = []

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(torch.overrides._get_current_function_mode())
            return super().forward(x)

    layer = Other(3, 2)
    layer.parametrizations = ["of the user's own"]
    with differentiable_weight_norm(layer.modules()):
        layer(torch.ones(1, 3))
    assert calls == [None]


@WAYS
def test_a_fisher_is_made_of_pytorchs_own_unless_it_is_to_be_differentiated(
    normalise: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    own = ours._weight_norm
    monkeypatch.setattr(ours, "_weight_norm", lambda *given: (calls.append(None), own(*given))[1])
    model, x, y = nn.Sequential(normalise(nn.Linear(2, 3), 0), nn.Tanh(), nn.Linear(3, 3)), torch.randn(3, 2), [0, 1, 2]
    for create_graph in (False, True):
        found = per_layer_fisher_diagonal(
            model, nn.CrossEntropyLoss(), x, torch.tensor(y), layer_types="all", create_graph=create_graph
        )
        assert bool(calls) is create_graph
    p = next(p for name, p in model.named_parameters() if name.startswith("0.") and p.dim() > 1)
    (derivative,) = torch.autograd.grad(found["0"].sum(), p)
    sums = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            p[0, 0] += step
        sums.append(per_layer_fisher_diagonal(model, nn.CrossEntropyLoss(), x, torch.tensor(y))["0"].sum())
    torch.testing.assert_close(derivative[0, 0], (sums[0] - sums[1]) / 2e-5, rtol=1e-6, atol=1e-8)


@WAYS
@DIMS
def test_hessians_are_those_of_differences(normalise: Callable[..., nn.Module], dim: int | None) -> None:
    """By differences of first derivatives: double backward through PyTorch's kernel takes the norm for a constant."""
    layer = normalise(nn.Conv1d(2, 2, 2), dim)
    model, x, y = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)), torch.randn(3, 2, 3), torch.arange(3)
    with no_warnings():
        found = per_layer_hessian_diagonal(model, nn.CrossEntropyLoss(), x, y, layer_types="all").by_parameter()

    def gradient(p: Tensor) -> Tensor:
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), y), p)[0]

    for name, p in layer.named_parameters(prefix="0"):
        expected = torch.zeros_like(p)
        for i in range(p.numel()):
            step = torch.zeros(p.numel()).index_fill_(0, torch.tensor(i), 1e-5).view_as(p)
            with torch.no_grad():
                p.add_(step)
                above = gradient_of(gradient, p)
                p.sub_(2 * step)
                below = gradient_of(gradient, p)
                p.add_(step)
            expected.view(-1)[i] = (above - below).view(-1)[i] / 2e-5
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-8)


def gradient_of(gradient: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    with torch.enable_grad():
        return gradient(p)
