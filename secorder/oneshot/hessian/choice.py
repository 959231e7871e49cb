"""Hessian diagonals per layer: which pairs (u, v) make them, and the checks that allow each way.

With z a layer's output, H_z the Hessian of the loss with respect to z, and J_n the map from the layer's parameters to
z_n, a layer that is linear in its parameters has the Hessian Σ_{n,m} J_nᵀ H_z[n, m] J_m. Three exact ways lead to its
diagonal, and the cheapest that is allowed is taken, layer by layer:

- ``"columns"``: the model is piecewise linear after the layer, so that H_z = Jᵀ H_out J with H_out the loss's Hessian
  in the model's output. C columns of a square root of H_out, C the outputs of one sample, serve all layers together.
- ``"output-basis"``: samples do not interact, so that H_z is block diagonal: v runs over the basis of one sample's z,
  for all samples at once, u = H_z v.
- ``"parameter-basis"``: v runs over the basis of the parameters. Needs nothing, exact for any layer.

What is checked, at run time, before a way is taken:

- *own use*: the parameters act only through the recorded calls of the layer, and no call's input depends on the
  layer's own output. Read off the structure of the autograd graph, so that it cannot be fooled.
- *samples independent* (output-basis): for each bit of the sample index, a random v on the samples with that bit must
  give exact zeros on the others. Two samples differ in some bit, so a coupled pair shows for almost every v
  (probability one in exact arithmetic; a coupling below the underflow of the number format does not show).
- *piecewise linear* (columns): with w = ∂L/∂f fixed, ∂²⟨w, f⟩/∂z² v for a random v must be exactly zero in every
  entry: one that is not exactly zero anywhere sends its layers to the output-basis. No tolerance is involved.
- *outputs by sample* (columns): the loss's Hessian in f is block diagonal (by bits, as above), and the vjp of a
  combination of columns, each sample weighted by a random factor, must be the weighted vjp, to rounding.
"""

import torch
from torch import Tensor

from ..._torch.pytree import tensors_in
from ..._torch.vjp import gradients
from ...layers.structure import linear_by_structure
from ..independence import block_diagonal, sample_bits
from ..loss import require_dependence
from ..recorded_layer import layout_options
from ..recording import Recording
from .columns import by_columns
from .plan import Plan
from .policy import Policy
from .problem import Problem

__all__ = ["choose_strategies"]


def choose_strategies(
    problem: Problem, plans: list[Plan], recording: Recording, policy: Policy, *, columns: bool, dry: bool = False
) -> None:
    """Choose each layer's way; layers that the columns serve are finished here, on the graph that is there anyway.

    Args:
        problem: the measurement.
        plans: one a layer; receive what was found.
        recording: of the layers that have a rule; a forward is run in it.
        policy: how exact, how expensive.
        columns: whether columns may be used.
        dry: find out about the columns, and do not compute them.
    """
    output, loss = problem.loss()
    recording.close()
    if not loss.requires_grad:
        require_dependence(problem.isolated.model, problem.loss_fn, problem.inputs, problem.targets)
    known = _linear_by_structure(problem, plans) if columns else []
    problem.outputs = sum(t.numel() for t in tensors_in(output) if t.requires_grad)
    problem.passed = problem.outputs + sum(t.numel() for t in tensors_in(list(recording.leaves.values())))
    second_order = len(known) < len(plans)
    candidates = _attach(problem, plans, recording, loss, create_graph=second_order)
    if columns and candidates:
        by_columns(problem, output, loss, candidates, known, policy, dry)
        candidates = [plan for plan in candidates if plan.strategy != "columns"]
    if candidates and not second_order:
        candidates = _attach(problem, candidates, recording, loss, create_graph=True)
    count = problem.num_samples
    in_z = [p for p in candidates if sum(leaf.numel() for leaf in p.leaves) // count <= p.numel]
    if policy.method != "exact":  # draws go by z wherever they may
        in_z = candidates
    _verify_samples(problem, in_z)
    for plan in plans:
        if plan.strategy in ("unused", "columns"):
            continue
        by_z = plan in in_z and plan.checks["samples_independent"]
        if policy.affords(plan.exact_hvps(), problem.passed):
            plan.strategy = "output-basis" if by_z and sum(plan.sizes) <= plan.numel else "parameter-basis"
        else:
            plan.strategy = "output-draws" if by_z else "parameter-draws"


def _linear_by_structure(problem: Problem, plans: list[Plan]) -> list[Plan]:
    """The plans of layers after which the model is known to be piecewise linear, without a look at numbers."""
    model = problem.isolated.model
    return [plan for plan in plans if problem.certain and linear_by_structure(model, plan.layer.module)]


def _attach(
    problem: Problem, plans: list[Plan], recording: Recording, loss: Tensor, *, create_graph: bool
) -> list[Plan]:
    """Give the plans their recorded calls and gradients; returns those that the own-use check allows in z-space."""
    unusable = recording.unusable()
    names = [plan.layer.name for plan in plans if plan.layer.name in recording.leaves]
    leaves = [leaf for name in names for leaf in recording.leaves[name]]
    ruled = [plan for plan in plans if plan.layer.rule is not None]
    replacements = [s for plan in ruled for s in problem.isolated.replacements(plan.layer)]
    found: list[Tensor | None] = [None] * (len(leaves) + len(replacements))
    if loss.requires_grad:
        found = gradients(loss, leaves + replacements, create_graph=create_graph)
    if len(ruled) == len(plans) and all(g is None for g in found):
        require_dependence(problem.isolated.model, problem.loss_fn, problem.inputs, problem.targets)
    by_leaf = dict(zip((id(x) for x in leaves + replacements), found, strict=True))
    candidates = []
    for plan in ruled:
        name = plan.layer.name
        plan.inputs = recording.inputs.get(name, [])
        plan.leaves = recording.leaves.get(name, [])
        plan.output_gradients = [by_leaf[id(leaf)] for leaf in plan.leaves]
        outside = any(by_leaf[id(s)] is not None for s in problem.isolated.replacements(plan.layer))
        plan.checks["own_use"] = not outside and name not in unusable and not _feeds_itself(plan)
        if outside or name in unusable:
            continue
        if all(g is None for g in plan.output_gradients):
            plan.strategy = "unused"
        elif plan.checks["own_use"]:
            candidates.append(plan)
    return candidates


def _feeds_itself(plan: Plan) -> bool:
    """Whether a call's input depends on the output of another call of the layer."""
    if len(plan.leaves) == 1:
        return False
    ends = [x for call in plan.inputs for x in call if x.requires_grad]
    reached = gradients(ends, plan.leaves, [torch.ones_like(x) for x in ends]) if ends else []
    return any(r is not None for r in reached)


def _verify_samples(problem: Problem, plans: list[Plan]) -> None:
    """Find for each plan a layout under which H_z is block diagonal over samples; sets ``layouts`` and the check."""
    options = {id(plan): layout_options(plan, problem.num_samples) for plan in plans}
    open_plans = [plan for plan in plans if options[id(plan)]]
    for plan in plans:
        plan.checks["samples_independent"] = False
    for plan in open_plans:
        plan.layouts = options[id(plan)][0]
    if len(open_plans) > 1 and _independent(problem, open_plans):  # one joint check serves all
        for plan in open_plans:
            plan.checks["samples_independent"] = True
        return
    for plan in open_plans:
        for layouts in options[id(plan)]:
            plan.layouts = layouts
            if _independent(problem, [plan]):
                plan.checks["samples_independent"] = True
                break


def _independent(problem: Problem, plans: list[Plan]) -> bool:
    """Whether the joint H_z of the plans' layers is block diagonal over samples."""
    for plan in plans:
        plan.num_hvps += len(sample_bits(problem.num_samples))
    return block_diagonal(
        [output_gradient for plan in plans for output_gradient in plan.output_gradients],
        [leaf for plan in plans for leaf in plan.leaves],
        [layout for plan in plans for layout in plan.layouts],
        problem.generator,
    )
