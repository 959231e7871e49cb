"""Hutchinson's estimates: unbiased, from random signs on a layer's output, or on its parameters."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._torch.vjp import chunks, default_chunk_size, stacked_vjp
from ...layers.contraction import contract
from ...layers.dtypes import compute_dtype, zeros
from ...layers.per_sample import PerSample, with_cotangents
from .bases import in_z_elements, on_parameters_elements
from .plan import Plan
from .policy import Policy
from .problem import Problem

__all__ = ["average", "draw_in_z", "parameter_draws", "relative_error", "z_draws"]

#: Draws that decide whether the part that columns do not give is easier to estimate than the whole.
_PILOT = 4


def draw_in_z(problem: Problem, plan: Plan, policy: Policy, advance: Callable[[int], None]) -> None:
    """Independent signs on every sample's z; on the residual alone where columns gave the rest and that pays."""
    draw, size = z_draws(problem, plan, plan.output_gradients)
    exact = plan.values  # the generalised Gauss-Newton part, or nothing
    if exact and policy.num_draws > 2 * _PILOT:
        draw_rest, _ = z_draws(problem, plan, plan.residual)
        whole, rest = draw(_PILOT), draw_rest(_PILOT)
        plan.num_hvps += 2 * _PILOT
        if sum(v.var(0).sum() for v in rest) < sum(v.var(0).sum() for v in whole):
            plan.strategy = "columns+output-draws"
            means, plan.errors = average(plan, policy, advance, draw_rest, size, offset=exact)
            plan.values = means
            return
    plan.values, plan.errors = average(plan, policy, advance, draw, size)


def average(
    plan: Plan,
    policy: Policy,
    advance: Callable[[int], None],
    draw: Callable[[int], list[Tensor]],
    size: int,
    offset: Sequence[Tensor] = (),
    like: Sequence[Tensor] = (),
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean of draws and its standard error, by parameter (Welford's update), until the policy is content.

    Args:
        plan: of the layer; counts draws and tells whether ``rtol`` was met.
        policy: how many draws, or how exact.
        advance: of the progress bar.
        draw: ``draw(k)`` gives k draws of each parameter's values.
        size: draws at a time.
        offset: what is known exactly and added to the mean.
        like: zeros of the shapes of one draw; by default those of the layer's parameters.
    """
    means = [z.clone() for z in like or zeros(plan.layer)]
    squares, seen = [z.clone() for z in means], 0
    known = list(offset) or [z.clone() for z in means]
    errors: list[Tensor] = []
    wanted = policy.num_draws
    while True:
        for ids in chunks(wanted - seen, size):
            for index, values in enumerate(draw(len(ids))):
                for at, value in enumerate(values, start=1):
                    delta = value - means[index]
                    means[index] += delta / (seen + at)
                    squares[index] += delta * (value - means[index])
            seen += len(ids)
            plan.num_hvps += len(ids)
            advance(len(ids))
        # One draw tells nothing of its error.
        errors = [(s / (seen - 1) / seen).sqrt() if seen > 1 else torch.full_like(s, torch.inf) for s in squares]
        plan.num_draws = seen
        if policy.rtol is None:
            break
        error = relative_error([m + k for m, k in zip(means, known, strict=True)], errors)
        plan.converged = error <= policy.rtol
        if plan.converged or seen >= policy.max_draws:
            break
        # The error falls with the root of the draws: go most of the way there.
        factor = min(4.0, max(1.2, (error / policy.rtol) ** 2))
        wanted = min(policy.max_draws, math.ceil(seen * factor))
    return [m + k for m, k in zip(means, known, strict=True)], errors


def relative_error(values: Sequence[Tensor], errors: Sequence[Tensor]) -> float:
    """``‖standard error‖ / ‖values‖`` of a layer; 0 where both vanish."""
    error = torch.cat([e.flatten() for e in errors]).norm().item()
    norm = torch.cat([v.flatten() for v in values]).norm().item()
    return 0.0 if error == 0 else error / norm if norm else math.inf


def z_draws(
    problem: Problem, plan: Plan, output_gradients: Sequence[Tensor | None]
) -> tuple[Callable[[int], list[Tensor]], int]:
    def draw(count: int) -> list[Tensor]:
        vectors = [problem.signs((count, *leaf.shape), leaf) for leaf in plan.leaves]
        u, v = plan.gradients(stacked_vjp(output_gradients, plan.leaves, vectors)), plan.gradients(vectors)
        return [
            torch.stack([contract(_pick(u[name], k), _pick(v[name], k), numel=p.numel()) for k in range(count)])
            for name, p in plan.layer.parameters.items()
        ]

    elements = in_z_elements(problem, plan) + plan.numel
    return draw, default_chunk_size(elements, plan.leaves[0], problem.chunk_size)


def _pick(gradient: PerSample, index: int) -> PerSample:
    return with_cotangents(gradient, lambda g: g[index])


def parameter_draws(
    problem: Problem, plan: Plan, output_gradients: list[Tensor | None]
) -> tuple[Callable[[int], list[Tensor]], int]:
    replacements = problem.isolated.replacements(plan.layer)
    kind = compute_dtype(plan.layer)

    def draw(count: int) -> list[Tensor]:
        vectors = [problem.signs((count, *s.shape), s) for s in replacements]
        products = stacked_vjp(output_gradients, replacements, vectors)
        return [(u * v).reshape(count, -1).to(kind) for u, v in zip(products, vectors, strict=True)]

    elements = on_parameters_elements(problem, plan)
    return draw, default_chunk_size(elements, replacements[0], problem.chunk_size)
