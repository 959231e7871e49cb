"""Traces of each layer's Hessian block, from the same Hessian-vector products."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.dtypes import zeros
from .hessian.bases import in_parameter_space
from .hessian.choice import choose_strategies
from .hessian.draws import average, parameter_draws, z_draws
from .hessian.plan import Plan
from .hessian.policy import Policy
from .hessian.problem import Problem, ruled
from .recording import recorded

__all__ = ["Trace", "layer_traces"]


@dataclass(frozen=True)
class Trace:
    """The trace of a layer's Hessian block.

    Attributes:
        value: an unbiased estimate, or the exact number.
        standard_error: of the estimate; 0 where it is exact, inf after one draw.
        num_draws: draws.
        converged: whether ``rtol`` was met.
    """

    value: float
    standard_error: float
    num_draws: int
    converged: bool


def layer_traces(problem: Problem, policy: Policy) -> dict[str, Trace]:
    """The trace of each layer's block, drawn in z where samples are independent, else on the parameters.

    See :meth:`secorder.CurvatureProbe.hessian_trace`, which this function carries out.
    """
    plans = [Plan(layer) for layer in problem.layers]
    found: dict[str, Trace] = {}

    def traced(draw: Callable[[int], list[Tensor]]) -> Callable[[int], list[Tensor]]:
        return lambda k: [torch.stack([v.flatten(1).sum(1) for v in draw(k)]).sum(0)[:, None]]

    def take(plan: Plan, draw: Callable[[int], list[Tensor]], size: int) -> None:
        like = zeros(plan.layer)[0]
        means, errors = average(plan, policy, lambda _: None, traced(draw), size, like=[like.new_zeros(1)])
        found[plan.layer.name] = Trace(means[0].item(), errors[0].item(), plan.num_draws, plan.converged)

    with recorded(problem.isolated, ruled(problem), own_parameters=False) as recording:
        choose_strategies(problem, plans, recording, policy, columns=True)
        for plan in plans:
            if plan.strategy == "columns":
                found[plan.layer.name] = Trace(sum(v.sum().item() for v in plan.values), 0.0, 0, True)
            elif plan.strategy == "unused":
                found[plan.layer.name] = Trace(0.0, 0.0, 0, True)
            elif plan.strategy == "output-draws":
                take(plan, *z_draws(problem, plan, plan.output_gradients))

    def work(plan: Plan, output_gradients: list[Tensor | None]) -> list[Tensor]:
        if plan.strategy == "unused":
            found[plan.layer.name] = Trace(0.0, 0.0, 0, True)
        else:
            take(plan, *parameter_draws(problem, plan, output_gradients))
        return []

    in_parameter_space(problem, [plan for plan in plans if plan.layer.name not in found], work)
    return {layer.name: found[layer.name] for layer in problem.layers}
