"""Hessian diagonals per layer: which pairs (u, v) make them, and the checks that allow each way.

With z a layer's output, H_z the Hessian of the loss with respect to z, and J_n the map from the layer's parameters to
z_n, a layer that is linear in its parameters has the Hessian Σ_{n,m} J_nᵀ H_z[n, m] J_m. Three exact ways lead to its
diagonal, and the cheapest that is allowed is taken, layer by layer:

- ``"columns"``: the model is piecewise linear after the layer, so that H_z = Jᵀ H_out J with H_out the loss's Hessian
  in the model's output. C columns of a square root of H_out, C the outputs of one sample, serve all layers together.
- ``"z-basis"``: samples do not interact, so that H_z is block diagonal: v runs over the basis of one sample's z, for
  all samples at once, u = H_z v.
- ``"parameter-basis"``: v runs over the basis of the parameters. Needs nothing, exact for any layer.

What is checked, at run time, before a way is taken:

- *own use*: the parameters act only through the recorded calls of the layer, and no call's input depends on the
  layer's own output. Read off the structure of the autograd graph, so that it cannot be fooled.
- *samples independent* (z-basis): for each bit of the sample index, a random v on the samples with that bit must give
  exact zeros on the others. Two samples differ in some bit, so a coupled pair shows for almost every v (probability
  one in exact arithmetic; a coupling below the underflow of the number format does not show).
- *piecewise linear* (columns): with w = ∂L/∂f fixed, ∂²⟨w, f⟩/∂z² v for a random v must be exactly zero in every
  entry: one that is not exactly zero anywhere sends its layers to the z-basis. No tolerance is involved.
- *outputs by sample* (columns): the loss's Hessian in f is block diagonal (by bits, as above), and the vjp of a
  combination of columns, each sample weighted by a random factor, must be the weighted vjp, to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .autocast import under_autocast
from .diagonals import Diagonals, LayerInfo
from .errors import InvalidArgumentError
from .layers import Layer
from .loan import Loan, Recording, borrow, check_loss, on_loan, recorded, require_dependence
from .products import check_chunk_size, chunks, default_chunk_size, fresh_generator, gradients, stacked_vjp, zero_tether
from .progress import progress_bar
from .rules import DIM_ZERO, Layout, Outer, PerSample, contract, contract_basis
from .trees import batch_size, require_agreement, sample_dimension, tensors_in
from .zspace import (
    ZLayer,
    block_diagonal,
    compute_dtype,
    contract_pairs,
    expose_output,
    layout_options,
    loss_of_output,
    loss_separates,
    sample_bits,
    signed_roots,
    zeros,
)

__all__ = ["HessianMethod", "hessian_diagonal"]

HessianMethod = Literal["exact", "hutchinson"]


def hessian_diagonal(
    model: nn.Module,
    layers: Sequence[Layer],
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    method: HessianMethod = "exact",
    num_samples: int = 100,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    chunk_size: int | None = None,
    progress: bool = False,
    sample_dim: int = 0,
) -> Diagonals:
    """∂²L/∂θ_i² of ``L = loss_fn(model(inputs), targets)`` for every parameter of the layers.

    See :meth:`secorder.CurvatureProbe.hessian_diagonal`, which this function carries out.
    """
    if method not in ("exact", "hutchinson"):
        raise InvalidArgumentError(f'method must be "exact" or "hutchinson", got {method!r}.')
    if num_samples < 1:
        raise InvalidArgumentError(f"num_samples must be at least 1, got {num_samples}.")
    if create_graph and method != "exact":
        raise InvalidArgumentError('create_graph=True needs method="exact".')
    check_chunk_size(chunk_size)
    count = batch_size(inputs, targets, sample_dim)
    generator = generator or fresh_generator()
    loss_fn = under_autocast(loss_fn)

    def work(direct: bool) -> Diagonals:
        with borrow(model, loss_fn, layers, create_graph=create_graph, direct=direct) as loan:
            problem = _Problem(
                loan, layers, loss_fn, inputs, targets, count, sample_dim, generator, chunk_size, progress
            )
            return _measure(problem, method, num_samples, create_graph=create_graph)

    return on_loan(work)


def _measure(problem: "_Problem", method: HessianMethod, num_samples: int, *, create_graph: bool) -> Diagonals:
    plans = [_Plan(layer) for layer in problem.layers]
    ruled = [layer for layer in problem.layers if layer.rule is not None]
    with recorded(problem.loan, ruled, own_parameters=False) as recording:
        _choose_ways(problem, plans, recording, exact=method == "exact", columns=not create_graph)
        if method == "hutchinson":
            _draws_in_z(problem, plans, num_samples)
        elif not create_graph:
            _exact_in_z(problem, plans)
    if create_graph:
        return _differentiable(problem, plans)
    if method == "hutchinson":
        _draws_in_parameters(problem, plans, num_samples)
    else:
        _exact_in_parameters(problem, plans)
    return _assemble(plans, errors=method == "hutchinson")


@dataclass
class _Problem:
    """One measurement: the borrowed model, the loss and how to work."""

    loan: Loan
    layers: Sequence[Layer]
    loss_fn: Callable[[Any, Any], Tensor]
    inputs: Any
    targets: Any
    num_samples: int
    sample_dim: int
    generator: torch.Generator
    chunk_size: int | None
    progress: bool

    def loss(self) -> tuple[Any, Tensor]:
        """The model's output and the loss, from the same random state each time."""
        output = self.loan.forward(self.inputs)
        require_agreement(output, self.targets, self.num_samples, self.sample_dim)
        loss = check_loss(self.loss_fn(output, self.targets), self.loan, self.inputs)
        self.loan.require_stand_ins(loss)
        # A factor that requires a gradient lets functions without a double backward see that there will be one: where
        # the gradient is constant, they would pass for linear.
        return output, loss * torch.ones_like(loss, requires_grad=True) if loss.requires_grad else loss

    def dimension(self, tensor: Tensor) -> int | None:
        """Where an output tensor's samples are."""
        return sample_dimension(tensor, self.num_samples, self.sample_dim)

    def random(self, shape: Sequence[int], like: Tensor) -> Tensor:
        device = self.generator.device
        return torch.randn(tuple(shape), generator=self.generator, dtype=like.dtype, device=device).to(like.device)

    def signs(self, shape: Sequence[int], like: Tensor) -> Tensor:
        bits = torch.randint(0, 2, tuple(shape), generator=self.generator, device=self.generator.device)
        return bits.to(like.device).mul_(2).sub_(1).to(like.dtype)


@dataclass
class _Plan(ZLayer):
    """A layer's way to its diagonal, with what was recorded and verified for it."""

    way: str = "parameter-basis"
    slopes: list[Tensor | None] = field(default_factory=list)  # ∂L/∂z by call, differentiable
    checks: dict[str, bool] = field(default_factory=dict)
    values: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    num_hvps: int = 0


# --------------------------------------------------------------------------------------------------------------------
# The plan: one forward and one differentiable backward, then the checks


def _choose_ways(problem: _Problem, plans: list[_Plan], recording: Recording, *, exact: bool, columns: bool) -> None:
    """Choose each layer's way; layers that the columns serve are finished here, on the graph that is there anyway."""
    output, loss = problem.loss()
    recording.close()
    if not loss.requires_grad:
        require_dependence(problem.loan.model, problem.loss_fn, problem.inputs, problem.targets)
    candidates = _attach(problem, plans, recording, loss)
    if exact and columns and candidates:
        _columns(problem, output, loss, candidates)
        candidates = [plan for plan in candidates if plan.way != "columns"]
    if exact:  # a basis of z larger than the parameters' is not worth a check
        count = problem.num_samples
        candidates = [p for p in candidates if sum(leaf.numel() for leaf in p.leaves) <= p.numel * count]
    _verify_samples(problem, candidates)
    for plan in candidates:
        if exact and plan.checks["samples_independent"]:
            plan.way = "z-basis"


def _attach(problem: _Problem, plans: list[_Plan], recording: Recording, loss: Tensor) -> list[_Plan]:
    """Give the plans their recorded calls and gradients; returns those that the own-use check allows in z-space."""
    unusable = recording.unusable()
    names = [plan.layer.name for plan in plans if plan.layer.name in recording.leaves]
    leaves = [leaf for name in names for leaf in recording.leaves[name]]
    ruled = [plan for plan in plans if plan.layer.rule is not None]
    stand_ins = [s for plan in ruled for s in problem.loan.stand_ins(plan.layer)]
    found: list[Tensor | None] = [None] * (len(leaves) + len(stand_ins))
    if loss.requires_grad:
        found = gradients(loss, leaves + stand_ins, create_graph=True)
    if len(ruled) == len(plans) and all(g is None for g in found):
        require_dependence(problem.loan.model, problem.loss_fn, problem.inputs, problem.targets)
    by_leaf = dict(zip((id(x) for x in leaves + stand_ins), found, strict=True))
    candidates = []
    for plan in ruled:
        name = plan.layer.name
        plan.inputs = recording.inputs.get(name, [])
        plan.leaves = recording.leaves.get(name, [])
        plan.slopes = [by_leaf[id(leaf)] for leaf in plan.leaves]
        outside = any(by_leaf[id(s)] is not None for s in problem.loan.stand_ins(plan.layer))
        plan.checks["own_use"] = not outside and name not in unusable and not _feeds_itself(plan)
        if outside or name in unusable:
            continue
        if all(g is None for g in plan.slopes):
            plan.way = "unused"
        elif plan.checks["own_use"]:
            candidates.append(plan)
    return candidates


def _feeds_itself(plan: _Plan) -> bool:
    """Whether a call's input depends on the output of another call of the layer."""
    if len(plan.leaves) == 1:
        return False
    ends = [x for call in plan.inputs for x in call if x.requires_grad]
    reached = gradients(ends, plan.leaves, [torch.ones_like(x) for x in ends]) if ends else []
    return any(r is not None for r in reached)


def _verify_samples(problem: _Problem, plans: list[_Plan]) -> None:
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


def _independent(problem: _Problem, plans: list[_Plan]) -> bool:
    """Whether the joint H_z of the plans' layers is block diagonal over samples."""
    for plan in plans:
        plan.num_hvps += len(sample_bits(problem.num_samples))
    return block_diagonal(
        [slope for plan in plans for slope in plan.slopes],
        [leaf for plan in plans for leaf in plan.leaves],
        [layout for plan in plans for layout in plan.layouts],
        problem.generator,
    )


# --------------------------------------------------------------------------------------------------------------------
# Columns: piecewise linear after the layer


def _columns(problem: _Problem, output: Any, loss: Tensor, plans: list[_Plan]) -> None:
    """Finish the layers after which the model is piecewise linear."""
    count = problem.num_samples
    if any(t.requires_grad and problem.dimension(t) is None for t in tensors_in(output)):
        return
    heads: list[Tensor] = []
    expose_output(output, heads, problem.dimension, detach=False)
    if not heads:
        return
    outputs = sum(t[0].numel() for t in heads)

    def worth_it(candidates: list[_Plan]) -> bool:  # against the HVPs of the layers' own bases
        return outputs <= sum(min(sum(x.numel() for x in p.leaves) // count, p.numel) for p in candidates)

    if not worth_it(plans):
        return
    found = loss_of_output(problem.loss_fn, output, problem.targets, problem.dimension, loss)
    if found is None:
        return
    again, points, _ = found
    if any(g is not None for g in gradients(again, [leaf for plan in plans for leaf in plan.leaves])):
        return  # the loss reaches into the model past its output
    slopes = gradients(again, points, create_graph=True)
    certified = _piecewise_linear(problem, heads, slopes, plans)
    if not certified or not worth_it(certified) or not loss_separates(slopes, points, problem.generator):
        return
    pairs = signed_roots(slopes, points, problem.chunk_size)
    options = [layout_options(plan, count) for plan in certified]
    diagonals = contract_pairs(
        heads, certified, pairs, options, generator=problem.generator, chunk_size=problem.chunk_size
    )
    for plan, values in zip(certified, diagonals, strict=True):
        plan.checks["outputs_by_sample"] = values is not None
        plan.num_hvps += len(pairs.u) + 2
        if values is not None:
            plan.way, plan.values = "columns", values


def _piecewise_linear(
    problem: _Problem, heads: list[Tensor], slopes: list[Tensor | None], plans: list[_Plan]
) -> list[_Plan]:
    """The plans with ∂²⟨w, f⟩/∂z² = 0 exactly, w = ∂L/∂f fixed."""
    weighted = [(f, w.detach().requires_grad_(True)) for f, w in zip(heads, slopes, strict=True) if w is not None]
    leaves = [leaf for plan in plans for leaf in plan.leaves]
    first = gradients([f for f, _ in weighted], leaves, [w for _, w in weighted], create_graph=True)
    by_leaf = dict(zip((id(x) for x in leaves), first, strict=True))

    def residual_is_zero(group: list[_Plan]) -> list[bool]:
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


# --------------------------------------------------------------------------------------------------------------------
# Exact: the bases


def _exact_in_z(problem: _Problem, plans: list[_Plan]) -> None:
    """The values of the plans that go by the basis of z, on the graph that was recorded."""
    in_z = [plan for plan in plans if plan.way == "z-basis"]
    with progress_bar(problem.progress, "Hessian, z-basis", sum(sum(plan.sizes) for plan in in_z)) as advance:
        for plan in in_z:
            plan.values = _z_basis(problem, plan, advance)
            plan.slopes = []  # frees the graph as far as no other layer needs it


def _exact_in_parameters(problem: _Problem, plans: list[_Plan], *, create_graph: bool = False) -> None:
    """The values of the plans that go by the basis of the parameters, on a graph of their own."""
    rest = [plan for plan in plans if plan.way == "parameter-basis"]
    with progress_bar(problem.progress, "Hessian, parameter basis", sum(plan.numel for plan in rest)) as advance:
        _in_parameter_space(
            problem, rest, lambda plan, g: _parameter_basis(problem, plan, g, advance, create_graph=create_graph)
        )


def _z_basis(
    problem: _Problem, plan: _Plan, advance: Callable[[int], None], create_graph: bool = False
) -> list[Tensor]:
    """The diagonal with v over the basis of one sample's outputs, all samples at once, call by call."""
    totals: list[Tensor] = zeros(plan.layer)
    elements = sum(leaf.numel() for leaf in plan.leaves)
    size = default_chunk_size(2 * elements, plan.leaves[0], problem.chunk_size)
    for call, basis_size in enumerate(plan.sizes):
        for ids in chunks(basis_size, size):
            vectors = [leaf.new_zeros(()).expand(len(ids), *leaf.shape) for leaf in plan.leaves]
            vectors[call] = _basis(plan.leaves[call], plan.layouts[call], ids)
            products = stacked_vjp(plan.slopes, plan.leaves, vectors, create_graph=create_graph)
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


def _in_parameter_space(
    problem: _Problem,
    plans: list[_Plan],
    work: Callable[[_Plan, list[Tensor | None]], list[Tensor]],
) -> None:
    """Run ``work`` on each plan with the loss's gradient in the layer's parameters, all uses of them counted."""
    if not plans:
        return
    _, loss = problem.loss()
    stand_ins = [s for plan in plans for s in problem.loan.stand_ins(plan.layer)]
    found = gradients(loss, stand_ins, create_graph=True) if loss.requires_grad else [None] * len(stand_ins)
    if all(g is None for g in found):
        require_dependence(problem.loan.model, problem.loss_fn, problem.inputs, problem.targets)
    by_stand_in = dict(zip((id(s) for s in stand_ins), found, strict=True))
    for plan in plans:
        own = [by_stand_in[id(s)] for s in problem.loan.stand_ins(plan.layer)]
        if all(g is None for g in own):
            plan.way = "unused"
        plan.values = work(plan, own)


def _parameter_basis(
    problem: _Problem,
    plan: _Plan,
    slopes: list[Tensor | None],
    advance: Callable[[int], None],
    create_graph: bool = False,
) -> list[Tensor]:
    """The diagonal with v over the basis of the parameters."""
    stand_ins = problem.loan.stand_ins(plan.layer)
    kind = compute_dtype(plan.layer)
    if plan.way == "unused":
        advance(plan.numel)
        return zeros(plan.layer)
    sizes = [s.numel() for s in stand_ins]
    elements = 4 * (plan.numel + sum(t.numel() for t in tensors_in(problem.inputs)))
    diagonal = []
    for ids in chunks(plan.numel, default_chunk_size(elements, stand_ins[0], problem.chunk_size)):
        flat = stand_ins[0].new_zeros(len(ids), plan.numel)
        flat[range(len(ids)), list(ids)] = 1
        vectors = [part.reshape(-1, *s.shape).to(s) for part, s in zip(flat.split(sizes, 1), stand_ins, strict=True)]
        products = stacked_vjp(slopes, stand_ins, vectors, create_graph=create_graph)
        joined = torch.cat([u.reshape(len(ids), -1).to(kind) for u in products], 1)
        diagonal.append(joined[range(len(ids)), list(ids)])
        plan.num_hvps += len(ids)
        advance(len(ids))
    return list(torch.cat(diagonal).split(sizes))


def _differentiable(problem: _Problem, plans: list[_Plan]) -> Diagonals:
    """The exact diagonal with a graph: the ways of the plan again, on a graph that reaches the parameters."""
    in_z = [plan for plan in plans if plan.way == "z-basis"]
    with recorded(problem.loan, [plan.layer for plan in in_z], own_parameters=True) as recording:
        _, loss = problem.loss()
        for plan in in_z:
            plan.inputs, plan.leaves = recording.inputs[plan.layer.name], recording.leaves[plan.layer.name]
            plan.slopes = gradients(loss, plan.leaves, create_graph=True)
            plan.values = _z_basis(problem, plan, lambda _: None, create_graph=True)
    _exact_in_parameters(problem, plans, create_graph=True)
    # A diagonal that happens to be constant must still be differentiable: its gradient is zero, not an error.
    tether = zero_tether(problem.loan.model)
    for plan in plans:
        plan.values = [value + tether for value in plan.values or zeros(plan.layer)]
    return _assemble(plans, detach=False)


def _assemble(plans: list[_Plan], *, detach: bool = True, errors: bool = False) -> Diagonals:
    values = {p.layer.name: p.values or zeros(p.layer) for p in plans}
    if detach:
        values = {name: [v.detach() for v in parts] for name, parts in values.items()}
    info = {p.layer.name: LayerInfo(p.way, p.num_hvps, dict(p.checks)) for p in plans}
    standard_error = {p.layer.name: p.errors or zeros(p.layer) for p in plans} if errors else None
    return Diagonals([p.layer for p in plans], values, info, standard_error)


# --------------------------------------------------------------------------------------------------------------------
# Hutchinson: unbiased estimates from random signs


def _draws_in_z(problem: _Problem, plans: list[_Plan], draws: int) -> None:
    """Independent signs on every sample's z, where samples are independent; on the graph that was recorded."""
    for plan in plans:
        if plan.checks.get("samples_independent"):
            plan.way = "z-draws"
    in_z = [plan for plan in plans if plan.way == "z-draws"]
    with progress_bar(problem.progress, "Hessian, draws in z", draws * len(in_z)) as advance:
        for plan in in_z:
            plan.values, plan.errors = _average(plan, draws, advance, *_z_draws(problem, plan))
            plan.slopes = []


def _draws_in_parameters(problem: _Problem, plans: list[_Plan], draws: int) -> None:
    """Signs on the parameters, for the layers whose samples are coupled or that have no rule."""
    rest = [plan for plan in plans if plan.way == "parameter-basis"]
    with progress_bar(problem.progress, "Hessian, draws on parameters", draws * len(rest)) as advance:

        def work(plan: _Plan, slopes: list[Tensor | None]) -> list[Tensor]:
            if plan.way == "unused":
                return []
            plan.way = "parameter-draws"
            means, plan.errors = _average(plan, draws, advance, *_parameter_draws(problem, plan, slopes))
            return means

        _in_parameter_space(problem, rest, work)


def _average(
    plan: _Plan, draws: int, advance: Callable[[int], None], draw: Callable[[int], list[Tensor]], size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean of the draws and its standard error, by parameter (Welford's update, chunk by chunk)."""
    means, squares, seen = zeros(plan.layer), zeros(plan.layer), 0
    for ids in chunks(draws, size):
        for index, values in enumerate(draw(len(ids))):
            for offset, value in enumerate(values, start=1):
                delta = value - means[index]
                means[index] += delta / (seen + offset)
                squares[index] += delta * (value - means[index])
        seen += len(ids)
        plan.num_hvps += len(ids)
        advance(len(ids))
    if draws == 1:  # one draw tells nothing of its error
        return means, [torch.full_like(s, torch.inf) for s in squares]
    return means, [(s / (draws - 1) / draws).sqrt() for s in squares]


def _z_draws(problem: _Problem, plan: _Plan) -> tuple[Callable[[int], list[Tensor]], int]:
    def draw(count: int) -> list[Tensor]:
        vectors = [problem.signs((count, *leaf.shape), leaf) for leaf in plan.leaves]
        u, v = plan.gradients(stacked_vjp(plan.slopes, plan.leaves, vectors)), plan.gradients(vectors)
        return [
            torch.stack([contract(_pick(u[name], k), _pick(v[name], k), numel=p.numel()) for k in range(count)])
            for name, p in plan.layer.parameters.items()
        ]

    elements = 2 * sum(leaf.numel() for leaf in plan.leaves) + plan.numel
    return draw, default_chunk_size(elements, plan.leaves[0], problem.chunk_size)


def _pick(gradient: PerSample, index: int) -> PerSample:
    return Outer(gradient.a, gradient.g[index]) if isinstance(gradient, Outer) else gradient[index]


def _parameter_draws(
    problem: _Problem, plan: _Plan, slopes: list[Tensor | None]
) -> tuple[Callable[[int], list[Tensor]], int]:
    stand_ins = problem.loan.stand_ins(plan.layer)
    kind = compute_dtype(plan.layer)

    def draw(count: int) -> list[Tensor]:
        vectors = [problem.signs((count, *s.shape), s) for s in stand_ins]
        products = stacked_vjp(slopes, stand_ins, vectors)
        return [(u * v).reshape(count, -1).to(kind) for u, v in zip(products, vectors, strict=True)]

    elements = 4 * (plan.numel + sum(t.numel() for t in tensors_in(problem.inputs)))
    return draw, default_chunk_size(elements, stand_ins[0], problem.chunk_size)
