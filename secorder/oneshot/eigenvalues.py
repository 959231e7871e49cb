"""Traces and extreme eigenvalues of each layer's Hessian block, from the same Hessian-vector products.

The block of a layer is ∂²L/∂θ² for its parameters θ together. Where the layer is linear in θ, and θ acts only through
the layer's calls, the block is ``Jᵀ H_z J``: a product with a vector takes the layer itself (J v), one Hessian-vector
product on the graph after the layer, and the layer's rule (Jᵀ u). Elsewhere it is a product on the parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch.modules import parameters_replaced
from .._torch.vjp import stacked_vjp
from ..layers.dtypes import compute_dtype
from ..layers.per_sample import total_gradient, with_cotangents
from .hessian.bases import in_parameter_space
from .hessian.choice import choose_strategies
from .hessian.plan import Plan
from .hessian.policy import Policy
from .hessian.problem import Problem, ruled
from .recording import recorded

__all__ = ["Eigenvalues", "lanczos", "layer_eigenvalues"]


@dataclass(frozen=True)
class Eigenvalues:
    """Extreme eigenvalues of a layer's Hessian block.

    Attributes:
        top: the largest eigenvalues, descending.
        bottom: the smallest eigenvalues, ascending.
        residual: largest ``‖H q − λ q‖`` of them; each is within this of an eigenvalue of the block.
        num_hvps: Hessian-vector products taken.
        converged: whether the residual met the tolerance.
    """

    top: list[float]
    bottom: list[float]
    residual: float
    num_hvps: int
    converged: bool


def layer_eigenvalues(
    problem: Problem, policy: Policy, *, count: int, tolerance: float, max_iterations: int
) -> dict[str, Eigenvalues]:
    """Largest and smallest eigenvalues of each layer's block.

    See :meth:`secorder.CurvatureProbe.hessian_eigenvalues`, which this function carries out.
    """
    plans = [Plan(layer) for layer in problem.layers]
    found: dict[str, Eigenvalues] = {}

    def solve(plan: Plan, product: Callable[[Tensor], Tensor]) -> None:
        kind = compute_dtype(plan.layer)
        start = problem.random((plan.numel,), plan.layer_like(kind))
        found[plan.layer.name] = lanczos(product, start, count, tolerance, min(max_iterations, plan.numel))

    with recorded(problem.isolated, ruled(problem), own_parameters=False) as recording:
        choose_strategies(problem, plans, recording, policy, columns=False)
        for plan in plans:
            if plan.strategy == "unused":
                found[plan.layer.name] = Eigenvalues([0.0] * count, [0.0] * count, 0.0, 0, True)
            elif plan.checks.get("own_use") and plan.layouts:
                solve(plan, _product_in_z(plan))

    def work(plan: Plan, output_gradients: list[Tensor | None]) -> list[Tensor]:
        solve(plan, _product_on_parameters(problem, plan, output_gradients))
        return []

    in_parameter_space(problem, [plan for plan in plans if plan.layer.name not in found], work)
    return {layer.name: found[layer.name] for layer in problem.layers}


def _product_in_z(plan: Plan) -> Callable[[Tensor], Tensor]:
    """v ↦ Jᵀ H_z J v."""
    sizes = [p.numel() for p in plan.layer.parameters.values()]

    def product(v: Tensor) -> Tensor:
        parts = v.split(sizes)
        along = {
            name: part.view_as(p).to(p.dtype)
            for (name, p), part in zip(plan.layer.parameters.items(), parts, strict=True)
        }
        zero = {name: torch.zeros_like(p) for name, p in along.items()}
        with torch.no_grad():  # z is affine in θ: J v is the difference of two calls
            tangents = [_call(plan, along, call) - _call(plan, zero, call) for call in plan.inputs]
        found = stacked_vjp(plan.output_gradients, plan.leaves, [t[None] for t in tangents])
        gradients = plan.gradients(found)
        flat = [
            total_gradient(with_cotangents(gradients[name], lambda g: g[0]), size)
            for (name, _), size in zip(plan.layer.parameters.items(), sizes, strict=True)
        ]
        return torch.cat(flat).to(v.dtype)

    return product


def _call(plan: Plan, parameters: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """The layer's output with other parameters, past its hooks, which would record the call."""
    module = plan.layer.module
    with parameters_replaced(module, parameters):
        output: Tensor = module.forward(*inputs)
        return output


def _product_on_parameters(
    problem: Problem, plan: Plan, output_gradients: Sequence[Tensor | None]
) -> Callable[[Tensor], Tensor]:
    replacements = problem.isolated.replacements(plan.layer)
    sizes = [s.numel() for s in replacements]

    def product(v: Tensor) -> Tensor:
        vectors = [part.view_as(s).to(s.dtype)[None] for part, s in zip(v.split(sizes), replacements, strict=True)]
        return torch.cat([u.flatten() for u in stacked_vjp(output_gradients, replacements, vectors)]).to(v.dtype)

    return product


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, count: int, tolerance: float, iterations: int
) -> Eigenvalues:
    """Extreme eigenvalues of a symmetric operator by Lanczos iteration with full reorthogonalisation.

    Args:
        product: the operator.
        start: a random vector, of the operator's size.
        count: how many at each end.
        tolerance: on residuals, relative to the largest eigenvalue in modulus.
        iterations: products at most.

    Source: Golub, Van IsolatedModel, "Matrix computations", 4th edition, section 10.3.
    """
    basis = [start / start.norm()]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    top, bottom, residual, bound = [0.0] * count, [0.0] * count, math.inf, 0.0
    for step in range(1, iterations + 1):
        w = product(basis[-1])
        alphas.append(w @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # twice is enough
            w = w - known.T @ (known @ w)
        beta = w.norm()
        t = torch.diag(torch.stack(alphas).double())
        if betas:
            off = torch.stack(betas).double()
            t = t + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(t)
        size = values.abs().max().item()
        last = step == iterations or beta.item() <= 1e-12 * max(size, 1e-300)
        if last or step % 5 == 0:
            k = min(count, len(values))
            ends = torch.cat([vectors[-1, :k], vectors[-1, -k:]]).abs() * (0.0 if beta.item() <= 1e-12 * size else beta)
            residual, bound = ends.max().item(), tolerance * size
            top, bottom = values[-k:].flip(0).tolist(), values[:k].tolist()
            if last or (residual <= bound and len(values) >= 2 * count):
                break
        basis.append(w / beta)
        betas.append(beta)
    return Eigenvalues(top, bottom, residual, len(alphas), residual <= bound or len(alphas) == start.numel())
