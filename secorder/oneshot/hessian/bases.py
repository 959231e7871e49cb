"""Exact diagonals by the basis of a layer's output, or of its parameters."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..._torch.pytree import tensors_in
from ..._torch.vjp import chunks, default_chunk_size, gradients, stacked_vjp
from ...layers.contraction import contract_basis
from ...layers.dtypes import compute_dtype, zeros
from ...layers.layout import DIM_ZERO, Layout
from ..loss import require_dependence
from .plan import Plan
from .problem import Problem

__all__ = ["in_parameter_space", "in_z_elements", "on_parameters_elements", "parameter_basis", "z_basis"]


def in_z_elements(problem: Problem, plan: Plan) -> int:
    """Numbers that one product keeps at a time, about: what chunks are sized by."""
    return max(2 * sum(leaf.numel() for leaf in plan.leaves), problem.outputs)


def on_parameters_elements(problem: Problem, plan: Plan) -> int:
    return max(4 * (plan.numel + sum(t.numel() for t in tensors_in(problem.inputs))), problem.passed)


def z_basis(problem: Problem, plan: Plan, advance: Callable[[int], None], create_graph: bool = False) -> list[Tensor]:
    """The diagonal with v over the basis of one sample's outputs, all samples at once, call by call."""
    totals: list[Tensor] = zeros(plan.layer)
    size = default_chunk_size(in_z_elements(problem, plan), plan.leaves[0], problem.chunk_size)
    for call, basis_size in enumerate(plan.sizes):
        for ids in chunks(basis_size, size):
            vectors = [leaf.new_zeros(()).expand(len(ids), *leaf.shape) for leaf in plan.leaves]
            vectors[call] = _basis(plan.leaves[call], plan.layouts[call], ids)
            products = stacked_vjp(plan.output_gradients, plan.leaves, vectors, create_graph=create_graph)
            u, v = plan.gradients(products), plan.gradients(vectors)
            for index, (name, p) in enumerate(plan.layer.parameters.items()):
                totals[index] = totals[index] + contract_basis(u[name], v[name], numel=p.numel())
            plan.num_hvps += len(ids)
            advance(len(ids))
    return totals


def _basis(leaf: Tensor, layout: Layout, ids: range) -> Tensor:
    """Basis vectors ``ids`` of one sample's output, the same for every sample, shape ``(K, *leaf.shape)``."""
    split = layout.split(leaf.detach())
    rest = split.shape[1:]
    flat = leaf.new_zeros(len(ids), rest.numel())
    flat[range(len(ids)), list(ids)] = 1
    vectors = flat.view(len(ids), 1, *rest).expand(-1, split.shape[0], *rest)
    return vectors if layout == DIM_ZERO else torch.stack([layout.join(v) for v in vectors])


def in_parameter_space(
    problem: Problem,
    plans: list[Plan],
    work: Callable[[Plan, list[Tensor | None]], list[Tensor]],
) -> None:
    """Run ``work`` on each plan with the loss's gradient in the layer's parameters, all uses of them counted."""
    if not plans:
        return
    _, loss = problem.loss()
    replacements = [s for plan in plans for s in problem.isolated.replacements(plan.layer)]
    found = gradients(loss, replacements, create_graph=True) if loss.requires_grad else [None] * len(replacements)
    if all(g is None for g in found):
        require_dependence(problem.isolated.model, problem.loss_fn, problem.inputs, problem.targets)
    by_replacement = dict(zip((id(s) for s in replacements), found, strict=True))
    for plan in plans:
        own = [by_replacement[id(s)] for s in problem.isolated.replacements(plan.layer)]
        if all(g is None for g in own):
            plan.strategy = "unused"
        plan.values = work(plan, own)


def parameter_basis(
    problem: Problem,
    plan: Plan,
    output_gradients: list[Tensor | None],
    advance: Callable[[int], None],
    create_graph: bool = False,
) -> list[Tensor]:
    """The diagonal with v over the basis of the parameters."""
    replacements = problem.isolated.replacements(plan.layer)
    kind = compute_dtype(plan.layer)
    if plan.strategy == "unused":
        advance(plan.numel)
        return zeros(plan.layer)
    sizes = [s.numel() for s in replacements]
    elements = on_parameters_elements(problem, plan)
    diagonal = []
    for ids in chunks(plan.numel, default_chunk_size(elements, replacements[0], problem.chunk_size)):
        flat = replacements[0].new_zeros(len(ids), plan.numel)
        flat[range(len(ids)), list(ids)] = 1
        vectors = [part.reshape(-1, *s.shape).to(s) for part, s in zip(flat.split(sizes, 1), replacements, strict=True)]
        products = stacked_vjp(output_gradients, replacements, vectors, create_graph=create_graph)
        joined = torch.cat([u.reshape(len(ids), -1).to(kind) for u in products], 1)
        diagonal.append(joined[range(len(ids)), list(ids)])
        plan.num_hvps += len(ids)
        advance(len(ids))
    return list(torch.cat(diagonal).split(sizes))
