"""What a Hessian diagonal will take, before it is paid."""

from dataclasses import dataclass

from ..._torch.vjp import default_chunk_size
from ..recording import recorded
from .bases import in_z_elements, on_parameters_elements
from .choice import choose_strategies
from .plan import Plan
from .policy import Policy
from .problem import Problem, ruled

__all__ = ["LayerCost", "estimate_cost"]


@dataclass(frozen=True)
class LayerCost:
    """What the Hessian diagonal of one layer will take.

    Attributes:
        strategy: the strategy it will go by (see :class:`~secorder.LayerInfo`).
        num_hvps: Hessian-vector products, vector-Jacobian products for ``"columns"``; for estimates the least number.
        exact_hvps: those of the cheapest exact strategy that is allowed.
        num_bytes: memory of one batch of products, about.
    """

    strategy: str
    num_hvps: int
    exact_hvps: int
    num_bytes: int


def estimate_cost(problem: "Problem", policy: Policy) -> dict[str, LayerCost]:
    """What :func:`hessian_diagonal` would take for each layer: one forward, one backward and the checks are run.

    See :meth:`secorder.CurvatureProbe.estimate_cost`, which this function carries out.
    """
    plans = [Plan(layer) for layer in problem.layers]
    with recorded(problem.isolated, ruled(problem), own_parameters=False) as recording:
        choose_strategies(problem, plans, recording, policy, columns=True, dry=True)
    return {plan.layer.name: _cost(problem, plan, policy) for plan in plans}


def _cost(problem: "Problem", plan: "Plan", policy: Policy) -> LayerCost:
    products = {
        "unused": 0,
        "columns": plan.num_columns,
        "output-basis": sum(plan.sizes) if plan.layouts else 0,
        "parameter-basis": plan.numel,
    }.get(plan.strategy, policy.num_draws)
    elements = in_z_elements(problem, plan) if plan.leaves else on_parameters_elements(problem, plan)
    like = next(iter(plan.layer.parameters.values()))
    batch = min(max(products, 1), default_chunk_size(elements, like, problem.chunk_size))
    return LayerCost(plan.strategy, products, plan.exact_hvps(), 4 * batch * elements * like.element_size())
