"""Brute force in float64: what every number of the library is held against."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secorder._torch.pytree import call_model, map_tensors
from secorder._torch.random_state import cuda_devices, get_random_state, set_random_state
from secorder._torch.sparse import dense_gradients
from secorder._torch.weight_norm import differentiable_weight_norm

#: Reentrant checkpoints as plain calls.
PLAIN_CHECKPOINTS = patch("torch.utils.checkpoint.CheckpointFunction.apply", lambda f, preserve, *args: f(*args))

Loss = Callable[[Any, Any], Tensor]


def hessian_by_element(model: nn.Module, loss_fn: Loss, inputs: Any, targets: Any) -> dict[str, Tensor]:
    """∂²L/∂θ_i² by double backward, one parameter element after the other, by parameter name."""
    cuda = cuda_devices(model)
    state = get_random_state(cuda)
    result = {}
    parameters = named_parameters(model)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    for name, p in parameters.items():
        set_random_state(state, cuda)
        exact = dense_gradients(model.modules()), differentiable_weight_norm(model.modules())
        # The others have no double backward, or none that is exact (held against differences in its own test).
        with sdpa_kernel(SDPBackend.MATH), PLAIN_CHECKPOINTS, exact[0], exact[1]:
            loss = loss_fn(call_model(model, inputs), targets)
        (gradient,) = torch.autograd.grad(loss, p, create_graph=True, allow_unused=True)
        diagonal = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
        if gradient is not None and gradient.requires_grad:
            for i, element in enumerate(gradient.flatten()):
                (row,) = torch.autograd.grad(element, p, retain_graph=True, allow_unused=True)
                diagonal[i] = 0 if row is None else row.flatten()[i]
        result[name] = diagonal.view(p.shape)
    for name, p in parameters.items():
        p.requires_grad_(flags[name])
    set_random_state(state, cuda)
    return result


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, a shared one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def one(tree: Any, index: int, count: int, dim: int = 0, *, rows: bool = False) -> Any:
    """The batch that holds sample ``index`` alone; with ``rows``, tensors may hold several rows a sample in dim 0."""

    def cut(tensor: Tensor) -> Tensor:
        for d in (dim, 0):
            if tensor.dim() > d and tensor.shape[d] == count:
                return tensor.narrow(d, index, 1)
        if rows and tensor.dim() and tensor.shape[0] % count == 0:
            return tensor.unflatten(0, (count, -1))[index]
        return tensor

    return map_tensors(cut, tree)


def fisher_by_sample(
    model: nn.Module, loss_fn: Loss, inputs: Any, targets: Any, count: int, *, dim: int = 0
) -> dict[str, Tensor]:
    """(1/N) Σ_n (∂ℓ_n/∂θ)² by a loop over batches of one, by parameter name."""
    return fisher_of(gradients_by_sample(model, loss_fn, inputs, targets, count, dim=dim))


def fisher_of(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """(1/N) Σ_n g_n² of per-sample gradients ``(N, *shape)``."""
    return {name: (g**2).mean(0) for name, g in gradients.items()}


def gradients_by_sample(
    model: nn.Module, loss_fn: Loss, inputs: Any, targets: Any, count: int, *, dim: int = 0
) -> dict[str, Tensor]:
    """∂ℓ_n/∂θ by a loop over batches of one, by parameter name: shape ``(N, *shape)``."""
    parameters = named_parameters(model)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    found = {name: p.new_zeros(count, *p.shape).detach() for name, p in parameters.items()}
    for n in range(count):
        loss = loss_fn(call_model(model, one(inputs, n, count, dim)), one(targets, n, count, dim, rows=True))
        for name, g in zip(parameters, _gradients(loss, list(parameters.values())), strict=True):
            if g is not None:
                found[name][n] = g.to_dense()
    for name, p in parameters.items():
        p.requires_grad_(flags[name])
    return found


def norms_of_layers(gradients: dict[str, Tensor], layers: dict[str, list[str]]) -> dict[str, Tensor]:
    """What the norms of per-sample gradients tell of layers, each given by its parameters' names.

    ``(tr F)²`` and its squared standard error; |G|² and tr Σ of the gradient noise: told together, so that errors are
    relative to the larger one.
    """
    found = {}
    for layer, names in layers.items():
        rows = torch.cat([gradients[name].reshape(len(gradients[name]), -1) for name in names], 1)
        squares, count = rows.square().sum(1), len(rows)
        mean, batch = squares.mean(), rows.mean(0).square().sum()
        error = (squares - mean).square().sum() / max(count - 1, 1) / count
        found[f"{layer}: trace"] = torch.stack([mean**2, error])
        if count > 1:
            noise = [(count * batch - mean) / (count - 1), (mean - batch) * count / (count - 1)]
            found[f"{layer}: noise"] = torch.stack(noise)
    return found


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    try:
        return list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
    except RuntimeError as error:
        if "reentrant" not in str(error):
            raise
    for p in parameters:  # reentrant checkpoints run under .backward() alone
        p.grad = None
    loss.backward()
    found = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    return found


def ggn_by_sample(model: nn.Module, loss_fn: Loss, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """(1/N) Σ_n diag(J_nᵀ H_n J_n) with Jacobians and output Hessians formed whole, by parameter name."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    count = len(inputs)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for n in range(count):
        x, t = inputs[n : n + 1], targets[n : n + 1]

        def output(p: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return torch.func.functional_call(model, p, (x,))

        f = output(parameters)
        hessian = torch.func.hessian(lambda f, t=t: loss_fn(f, t))(f).reshape(f.numel(), f.numel())
        jacobian = torch.func.jacrev(output)(parameters)
        for name in parameters:
            j = jacobian[name].reshape(f.numel(), -1)
            total[name] += torch.einsum("ci,cd,di->i", j, hessian, j).view_as(total[name]) / count
    return total


def gradient_by_sample(module: nn.Module, inputs: tuple[Tensor, ...], g: Tensor) -> dict[str, Tensor]:
    """J_nᵀ g_n of a layer by one backward a sample, samples in dim 0, by parameter name: shape (N, parameter)."""
    output, parameters = module(*inputs), dict(module.named_parameters())
    rows = []
    for n in range(len(output)):
        alone = torch.zeros_like(output)
        alone[n] = g[n]
        rows.append(torch.autograd.grad(output, list(parameters.values()), alone, retain_graph=True))
    return {name: torch.stack([row[i].flatten() for row in rows]) for i, name in enumerate(parameters)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry of the reference."""
    if not expected.numel():
        return 0.0
    return (found.to(expected) - expected).abs().max().item() / max(expected.abs().max().item(), 1e-12)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Equal to a tolerance relative to the largest entry of the reference."""
    assert found.shape == expected.shape
    error = relative_error(found, expected)
    assert error <= tolerance, f"off by {error:.2e} of the largest entry"


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    """:func:`assert_close` for every parameter that was measured, and that some were."""
    assert found
    for name, value in found.items():
        assert_close(value, expected[name], tolerance)


def fisher_by_slices(model: nn.Module, loss_fn: Loss, inputs: Any, targets: Any, count: int) -> dict[str, Tensor]:
    """(1/N) Σ_n (∂ℓ_n/∂θ)² with ℓ_n the loss of one row of the batch's output: for models that draw random numbers."""
    return fisher_of(gradients_by_slices(model, loss_fn, inputs, targets, count))


def gradients_by_slices(model: nn.Module, loss_fn: Loss, inputs: Any, targets: Any, count: int) -> dict[str, Tensor]:
    """∂ℓ_n/∂θ with ℓ_n the loss of one row of the batch's output."""
    parameters = named_parameters(model)
    output = call_model(model, inputs)
    found = {name: p.new_zeros(count, *p.shape).detach() for name, p in parameters.items()}
    for n in range(count):
        loss = loss_fn(one(output, n, count), one(targets, n, count))
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, g in zip(parameters, gradients, strict=True):
            if g is not None:
                found[name][n] = g
    return found
