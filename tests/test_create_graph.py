"""``create_graph=True``: diagonals that are differentiable functions of the model's parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from secorder import per_layer_fisher_diagonal, per_layer_hessian_diagonal

from .helpers import Net
from .reference import assert_all_close, assert_close


def diagonals_of(measure, model: nn.Module, loss_fn, inputs, targets, **options):  # type: ignore[no-untyped-def]
    names = [name for name, _ in model.named_parameters()]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for name, value in zip(names, values, strict=True):
            owner, _, local = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[local] = value  # keeps the graph to the values
        found = measure(model, loss_fn, inputs, targets, create_graph=True, **options)
        return tuple(found.values())

    start = [p.detach().clone().requires_grad_(True) for p in model.parameters()]
    return function, start


MODELS = {
    "tanh": lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)),
    "relu": lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
    "linear": lambda: nn.Sequential(nn.Linear(2, 2)),
    "deep_linear": lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)),
    "normalised": lambda: nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2)),
}


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("measure", ["hessian", "fisher", "type-2"])
def test_gradcheck(measure: str, name: str, kind: str) -> None:
    model, inputs = MODELS[name](), torch.randn(3, 2)
    regression = kind == "regression"
    loss_fn, targets = (F.mse_loss, torch.randn(3, 2)) if regression else (F.cross_entropy, torch.randint(2, (3,)))
    function, start = diagonals_of(
        per_layer_hessian_diagonal if measure == "hessian" else per_layer_fisher_diagonal,
        model,
        loss_fn,
        inputs,
        targets,
        **({"fisher_type": "type-2"} if measure == "type-2" else {}),
    )
    assert torch.autograd.gradcheck(function, start)


def test_gradcheck_of_an_output_that_another_one_depends_on() -> None:
    """Each with a part in the loss, as the code of an autoencoder."""
    model = Net(
        lambda m, x: (m.decode(code := torch.tanh(m.encode(x))), code), encode=nn.Linear(3, 2), decode=nn.Linear(2, 3)
    )
    loss_fn = lambda f, t: F.mse_loss(f[0], t) + f[1].exp().sum(1).mean()  # noqa: E731
    inputs = torch.randn(3, 3)
    for kind in ("empirical", "type-2"):
        plain = per_layer_fisher_diagonal(model, loss_fn, inputs, inputs, fisher_type=kind)
        function, start = diagonals_of(per_layer_fisher_diagonal, model, loss_fn, inputs, inputs, fisher_type=kind)
        for found, expected in zip(function(*start), plain.values(), strict=True):
            assert_close(found.detach(), expected)
        assert torch.autograd.gradcheck(function, start)


def test_convolution_gradcheck() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))
    inputs, targets = torch.randn(2, 1, 3, 3), torch.randint(2, (2,))
    for measure in (per_layer_hessian_diagonal, per_layer_fisher_diagonal):
        function, start = diagonals_of(measure, model, F.cross_entropy, inputs, targets)
        assert torch.autograd.gradcheck(function, start)


def test_a_constant_diagonal_is_differentiable_with_gradient_zero() -> None:
    model = nn.Linear(2, 2)
    found = per_layer_hessian_diagonal(
        model, F.mse_loss, torch.randn(3, 2), torch.randn(3, 2), create_graph=True, method="exact"
    )
    gradients = torch.autograd.grad(found[""].sum(), list(model.parameters()))
    assert all(g.abs().max() == 0 for g in gradients)


@pytest.mark.parametrize("measure", [per_layer_hessian_diagonal, per_layer_fisher_diagonal])
def test_gradient_reaches_the_models_own_parameters_and_values_agree(measure) -> None:  # type: ignore[no-untyped-def]
    model = MODELS["tanh"]()
    inputs, targets = torch.randn(3, 2), torch.randint(2, (3,))
    plain = measure(model, F.cross_entropy, inputs, targets)
    assert not any(d.requires_grad for d in plain.values())
    found = measure(model, F.cross_entropy, inputs, targets, create_graph=True)
    assert_all_close({k: v.detach() for k, v in found.items()}, plain)
    sum(d.sum() for d in found.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name

    def trace(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        if measure is per_layer_fisher_diagonal:
            losses = [
                F.cross_entropy(functional_call(model, parameters, (inputs[n : n + 1],)), targets[n : n + 1])
                for n in range(3)
            ]
            rows = [torch.autograd.grad(loss, list(parameters.values()), create_graph=True) for loss in losses]
            return sum((g**2).sum() for row in rows for g in row) / 3
        loss = F.cross_entropy(functional_call(model, parameters, (inputs,)), targets)
        total = torch.zeros(())
        for p, g in zip(
            parameters.values(),
            torch.autograd.grad(loss, list(parameters.values()), create_graph=True),
            strict=True,
        ):
            for i, element in enumerate(g.flatten()):
                total = total + torch.autograd.grad(element, p, create_graph=True)[0].flatten()[i]
        return total

    copies = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    expected = torch.autograd.grad(trace(copies), list(copies.values()))
    for p, g in zip(model.parameters(), expected, strict=True):
        assert_close(p.grad, g)
