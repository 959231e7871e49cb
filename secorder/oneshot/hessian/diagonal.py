"""The Hessian diagonal of every layer, by the strategies that were chosen."""

from torch import Tensor

from ..._torch.vjp import gradients, zero_tether
from ...layers.dtypes import zeros
from ...monitor.progress import progress_bar
from ...results import Diagonals, LayerInfo
from ..recording import recorded
from .bases import in_parameter_space, parameter_basis, z_basis
from .choice import choose_strategies
from .draws import average, draw_in_z, parameter_draws, relative_error
from .plan import Plan
from .policy import Policy
from .problem import Problem, ruled

__all__ = ["hessian_diagonal"]


def hessian_diagonal(problem: "Problem", policy: Policy, *, create_graph: bool = False) -> Diagonals:
    """∂²L/∂θ_i² of ``L = loss_fn(model(inputs), targets)`` for every parameter of the layers.

    See :meth:`secorder.CurvatureProbe.hessian_diagonal`, which this function carries out.
    """
    plans = [Plan(layer) for layer in problem.layers]
    if create_graph:
        policy = Policy("exact", policy.num_draws, None, policy.max_draws, None)
    with recorded(problem.isolated, ruled(problem), own_parameters=False) as recording:
        choose_strategies(problem, plans, recording, policy, columns=not create_graph)
        if not create_graph:
            _in_z(problem, plans, policy)
    if create_graph:
        return _differentiable(problem, plans)
    _in_parameters(problem, plans, policy)
    return _assemble(plans)


def _in_z(problem: Problem, plans: list[Plan], policy: Policy) -> None:
    """The values of the plans that go by z, on the graph that was recorded."""
    exact = [plan for plan in plans if plan.strategy == "output-basis"]
    drawn = [plan for plan in plans if plan.strategy == "output-draws"]
    total = sum(sum(plan.sizes) for plan in exact) + policy.num_draws * len(drawn)
    with progress_bar(problem.progress and bool(total), "Hessian in z", total) as advance:
        for plan in exact:
            plan.values = z_basis(problem, plan, advance)
            plan.output_gradients = plan.residual = []  # frees the graph as far as no other layer needs it
        for plan in drawn:
            draw_in_z(problem, plan, policy, advance)
            plan.output_gradients = plan.residual = []


def _in_parameters(problem: Problem, plans: list[Plan], policy: Policy) -> None:
    """The values of the plans that go by the parameters, on a graph of their own."""
    rest = [plan for plan in plans if plan.strategy in ("parameter-basis", "parameter-draws")]
    total = sum(plan.numel if plan.strategy == "parameter-basis" else policy.num_draws for plan in rest)
    with progress_bar(problem.progress and bool(total), "Hessian on parameters", total) as advance:

        def work(plan: Plan, output_gradients: list[Tensor | None]) -> list[Tensor]:
            if plan.strategy == "parameter-basis":
                return parameter_basis(problem, plan, output_gradients, advance)
            if plan.strategy == "parameter-draws":
                draw, size = parameter_draws(problem, plan, output_gradients)
                means, plan.errors = average(plan, policy, advance, draw, size)
                return means
            return []

        in_parameter_space(problem, rest, work)


def _differentiable(problem: Problem, plans: list[Plan]) -> Diagonals:
    """The exact diagonal with a graph: the ways of the plan again, on a graph that reaches the parameters."""
    in_z = [plan for plan in plans if plan.strategy == "output-basis"]
    with recorded(problem.isolated, [plan.layer for plan in in_z], own_parameters=True) as recording:
        _, loss = problem.loss()
        for plan in in_z:
            plan.inputs, plan.leaves = recording.inputs[plan.layer.name], recording.leaves[plan.layer.name]
            plan.with_graph = True
            plan.output_gradients = gradients(loss, plan.leaves, create_graph=True)
            plan.values = z_basis(problem, plan, lambda _: None, create_graph=True)
    rest = [plan for plan in plans if plan.strategy == "parameter-basis"]
    in_parameter_space(
        problem, rest, lambda plan, g: parameter_basis(problem, plan, g, lambda _: None, create_graph=True)
    )
    # A diagonal that happens to be constant must still be differentiable: its gradient is zero, not an error.
    tether = zero_tether(problem.isolated.model)
    for plan in plans:
        plan.values = [value + tether for value in plan.values or zeros(plan.layer)]
    return _assemble(plans, detach=False)


def _assemble(plans: list[Plan], *, detach: bool = True) -> Diagonals:
    values = {p.layer.name: p.values or zeros(p.layer) for p in plans}
    if detach:
        values = {name: [v.detach() for v in parts] for name, parts in values.items()}
    info = {
        p.layer.name: LayerInfo(p.strategy, p.num_hvps, dict(p.checks), p.num_draws, _relative_error(p), p.converged)
        for p in plans
    }
    drawn = any(p.errors for p in plans)
    standard_error = {p.layer.name: p.errors or zeros(p.layer) for p in plans} if drawn else None
    return Diagonals([p.layer for p in plans], values, info, standard_error)


def _relative_error(plan: Plan) -> float:
    return relative_error(plan.values, plan.errors) if plan.errors else 0.0
