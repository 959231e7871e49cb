"""Columns of a root of the output Hessian, where the model is piecewise linear after the layer."""

from typing import Any

from torch import Tensor

from ..._torch.pytree import tensors_in
from ..._torch.vjp import gradients, stacked_vjp
from ..output_hessian import expose_output, known_roots, loss_of_output, loss_separates, signed_roots
from ..recorded_layer import contract_pairs
from .plan import Plan
from .policy import Policy
from .problem import Problem

__all__ = ["by_columns"]


def by_columns(
    problem: Problem, output: Any, loss: Tensor, plans: list[Plan], known: list[Plan], policy: Policy, dry: bool
) -> None:
    """Finish the layers after which the model is piecewise linear; for others, split off what columns give exactly."""
    count = problem.num_samples
    if any(t.requires_grad and problem.dimension(t) is None for t in tensors_in(output)):
        return
    model_outputs: list[Tensor] = []
    expose_output(output, model_outputs, problem.dimension, detach=False)
    if not model_outputs:
        return
    outputs = sum(t[0].numel() for t in model_outputs)

    def worth_it(candidates: list[Plan]) -> bool:  # against the products of the layers' own bases, or draws
        bases = sum(min(sum(x.numel() for x in p.leaves) // count, p.numel) for p in candidates)
        return outputs <= (policy.num_draws if policy.method == "hutchinson" else bases) and (
            policy.method != "auto" or policy.affords(outputs, sum(f.numel() for f in model_outputs))
        )

    if not worth_it(plans):
        return
    known = [p for p in plans if p in known]
    found = loss_of_output(problem.loss_fn, output, problem.targets, problem.dimension, loss)
    if found is None:
        return
    again, points, _ = found
    if any(g is not None for g in gradients(again, [leaf for plan in plans for leaf in plan.leaves])):
        return  # the loss reaches into the model past its output
    output_gradients = gradients(again, points, create_graph=True)
    for plan in known:
        plan.checks["piecewise_linear"] = True
    certified = known + _piecewise_linear(
        problem, model_outputs, output_gradients, [p for p in plans if p not in known]
    )
    served = plans if policy.method == "hutchinson" else certified  # the rest of these is drawn
    if not served or not worth_it(served):
        return
    pairs = known_roots(output_gradients, points)
    if pairs is None and not loss_separates(output_gradients, points, problem.generator):
        return
    if dry:
        for plan in certified:
            plan.strategy, plan.num_columns = "columns", outputs
        return
    pairs = pairs or signed_roots(output_gradients, points, problem.chunk_size)
    diagonals = contract_pairs(
        model_outputs,
        served,
        pairs,
        certain=problem.certain,
        generator=problem.generator,
        chunk_size=problem.chunk_size,
    )
    for plan, values in zip(served, diagonals, strict=True):
        plan.checks["outputs_by_sample"] = values is not None
        plan.num_columns = len(pairs.u)
        plan.num_hvps += len(pairs.u) + (0 if problem.certain else 2)
        if values is None:
            continue
        plan.values = values
        if plan in certified:
            plan.strategy = "columns"


def _piecewise_linear(
    problem: Problem, model_outputs: list[Tensor], output_gradients: list[Tensor | None], plans: list[Plan]
) -> list[Plan]:
    """The plans with ∂²⟨w, f⟩/∂z² = 0 exactly, w = ∂L/∂f fixed."""
    if not plans:
        return []
    weighted = [
        (f, w.detach().requires_grad_(True))
        for f, w in zip(model_outputs, output_gradients, strict=True)
        if w is not None
    ]
    leaves = [leaf for plan in plans for leaf in plan.leaves]
    first = gradients([f for f, _ in weighted], leaves, [w for _, w in weighted], create_graph=True)
    by_leaf = dict(zip((id(x) for x in leaves), first, strict=True))
    for plan in plans:
        plan.residual = [by_leaf[id(leaf)] for leaf in plan.leaves]

    def residual_is_zero(group: list[Plan]) -> list[bool]:
        inside = [leaf for plan in group for leaf in plan.leaves]
        for plan in group:
            plan.num_hvps += 1
        vectors = [problem.random(leaf.shape, leaf)[None] for leaf in inside]
        found = stacked_vjp([by_leaf[id(leaf)] for leaf in inside], inside, vectors)
        zero = {id(leaf): not bool((r != 0).any()) for leaf, r in zip(inside, found, strict=True)}
        return [all(zero[id(leaf)] for leaf in plan.leaves) for plan in group]

    for plan, zero in zip(plans, residual_is_zero(plans), strict=True):
        # Jointly non-zero may be the doing of another layer's perturbation: ask the layer alone.
        plan.checks["piecewise_linear"] = zero or (len(plans) > 1 and residual_is_zero([plan])[0])
    return [plan for plan in plans if plan.checks["piecewise_linear"]]
