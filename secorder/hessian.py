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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._torch.autocast import under_autocast
from ._torch.pytree import tensors_in
from ._torch.vjp import (
    check_chunk_size,
    chunks,
    default_chunk_size,
    fresh_generator,
    gradients,
    stacked_vjp,
    zero_tether,
)
from .batch import batch_size, require_agreement, sample_dimension
from .diagonals import Diagonals, LayerInfo
from .errors import InvalidArgumentError
from .layers import Layer
from .loan import Loan, Recording, Result, borrow, check_loss, on_loan, recorded, require_dependence
from .progress import progress_bar
from .rules import DIM_ZERO, Layout, PerSample, contract, contract_basis, with_cotangents
from .samples import independent_by_structure, linear_by_structure
from .zspace import (
    ZLayer,
    block_diagonal,
    compute_dtype,
    contract_pairs,
    expose_output,
    known_roots,
    layout_options,
    loss_of_output,
    loss_separates,
    sample_bits,
    signed_roots,
    zeros,
)

__all__ = [
    "HessianMethod",
    "LayerCost",
    "Plan",
    "Policy",
    "Problem",
    "average",
    "choose_ways",
    "estimate_cost",
    "hessian_diagonal",
    "in_parameter_space",
    "on_problem",
    "parameter_draws",
    "ruled",
    "z_draws",
]

HessianMethod = Literal["auto", "exact", "hutchinson"]

#: Where ``method="auto"`` goes over from exact to estimated: Hessian-vector products of one layer.
MAX_HVPS = 10_000
#: And such products times the numbers that one of them passes through (activations and outputs): some ten seconds.
MAX_WORK = 1_000_000_000
#: The relative error that ``method="auto"`` asks of its estimates.
AUTO_RTOL = 0.05


@dataclass(frozen=True)
class Policy:
    """How exact a measurement is to be, and what it may cost.

    Attributes:
        method: ``"exact"``, ``"hutchinson"``, or ``"auto"``: exact where a layer takes at most ``max_hvps``.
        num_samples: draws of an estimate; the least number where ``rtol`` is given.
        rtol: draw until a layer's relative error ``‖standard error‖ / ‖diagonal‖`` is at most this.
        max_num_samples: draws at most.
        max_hvps: Hessian-vector products that an exact way may take for one layer.
        max_work: such products times the numbers that each passes through.
    """

    method: HessianMethod
    num_samples: int
    rtol: float | None
    max_num_samples: int
    max_hvps: int | None
    max_work: float = math.inf

    @classmethod
    def checked(
        cls,
        method: HessianMethod,
        num_samples: int | None,
        rtol: float | None,
        max_num_samples: int,
        max_hvps: int | None,
    ) -> "Policy":
        """The policy of arguments as users pass them.

        Raises:
            InvalidArgumentError: one is out of its range, or they contradict each other.
        """
        if method not in ("auto", "exact", "hutchinson"):
            raise InvalidArgumentError(f'method must be "auto", "exact" or "hutchinson", got {method!r}.')
        if num_samples is not None and num_samples < 1:
            raise InvalidArgumentError(f"num_samples must be at least 1, got {num_samples}.")
        if rtol is not None and not rtol > 0:
            raise InvalidArgumentError(f"rtol must be positive, got {rtol!r}.")
        if max_hvps is not None and (method != "auto" or max_hvps < 0):
            raise InvalidArgumentError(
                f'max_hvps={max_hvps!r} must be at least 0, and goes with method="auto", which estimates the layers '
                "that would take more."
            )
        max_work = math.inf
        if method == "auto" and max_hvps is None:
            max_hvps, max_work = MAX_HVPS, MAX_WORK
        if method == "auto":
            rtol = AUTO_RTOL if rtol is None and num_samples is None else rtol
        draws = num_samples or (16 if rtol is not None else 100)
        if max_num_samples < draws:
            raise InvalidArgumentError(
                f"max_num_samples must be at least num_samples ({draws}), got {max_num_samples}."
            )
        return cls(method, draws, rtol, max_num_samples, max_hvps, max_work)

    def affords(self, num_hvps: int, elements: int) -> bool:
        """Whether an exact way may be taken: so many products, each through so many numbers."""
        if self.method == "exact":
            return True
        return self.max_hvps is not None and num_hvps <= self.max_hvps and num_hvps * elements <= self.max_work


def hessian_diagonal(problem: "Problem", policy: Policy, *, create_graph: bool = False) -> Diagonals:
    """∂²L/∂θ_i² of ``L = loss_fn(model(inputs), targets)`` for every parameter of the layers.

    See :meth:`secorder.CurvatureProbe.hessian_diagonal`, which this function carries out.
    """
    plans = [Plan(layer) for layer in problem.layers]
    if create_graph:
        policy = Policy("exact", policy.num_samples, None, policy.max_num_samples, None)
    with recorded(problem.loan, ruled(problem), own_parameters=False) as recording:
        choose_ways(problem, plans, recording, policy, columns=not create_graph)
        if not create_graph:
            _in_z(problem, plans, policy)
    if create_graph:
        return _differentiable(problem, plans)
    _in_parameters(problem, plans, policy)
    return _assemble(plans)


@dataclass(frozen=True)
class LayerCost:
    """What the Hessian diagonal of one layer will take.

    Attributes:
        way: the way it will go (see :class:`~secorder.LayerInfo`).
        num_hvps: Hessian-vector products, vector-Jacobian products for ``"columns"``; for estimates the least number.
        exact_hvps: those of the cheapest exact way that is allowed.
        bytes: memory of one batch of products, about.
    """

    way: str
    num_hvps: int
    exact_hvps: int
    bytes: int


def estimate_cost(problem: "Problem", policy: Policy) -> dict[str, LayerCost]:
    """What :func:`hessian_diagonal` would take for each layer: one forward, one backward and the checks are run.

    See :meth:`secorder.CurvatureProbe.estimate_cost`, which this function carries out.
    """
    plans = [Plan(layer) for layer in problem.layers]
    with recorded(problem.loan, ruled(problem), own_parameters=False) as recording:
        choose_ways(problem, plans, recording, policy, columns=True, dry=True)
    return {plan.layer.name: _cost(problem, plan, policy) for plan in plans}


def _cost(problem: "Problem", plan: "Plan", policy: Policy) -> LayerCost:
    products = {
        "unused": 0,
        "columns": plan.num_columns,
        "z-basis": sum(plan.sizes) if plan.layouts else 0,
        "parameter-basis": plan.numel,
    }.get(plan.way, policy.num_samples)
    elements = _in_z_elements(problem, plan) if plan.leaves else _on_parameters_elements(problem, plan)
    like = next(iter(plan.layer.parameters.values()))
    batch = min(max(products, 1), default_chunk_size(elements, like, problem.chunk_size))
    return LayerCost(plan.way, products, plan.exact_hvps(), 4 * batch * elements * like.element_size())


def on_problem(
    work: Callable[["Problem"], Result],
    model: nn.Module,
    layers: Sequence[Layer],
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    chunk_size: int | None = None,
    progress: bool = False,
    sample_dim: int = 0,
) -> Result:
    """Run ``work`` on a borrowed model."""
    check_chunk_size(chunk_size)
    count = batch_size(inputs, targets, sample_dim)
    generator = generator or fresh_generator()
    loss_fn = under_autocast(loss_fn)

    certain = independent_by_structure(model, sample_dim)

    def on_one_loan(direct: bool) -> Result:
        with borrow(model, loss_fn, layers, create_graph=create_graph, direct=direct) as loan:
            asked = loss_fn, inputs, targets, count, sample_dim, generator, chunk_size, progress
            return work(Problem(loan, layers, *asked, certain))

    return on_loan(on_one_loan)


def ruled(problem: "Problem") -> list[Layer]:
    """The layers that have a rule."""
    return [layer for layer in problem.layers if layer.rule is not None]


@dataclass
class Problem:
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
    certain: bool  # samples are independent by the model's structure
    passed: int = 0  # numbers that a product passes through: recorded activations and outputs
    outputs: int = 0  # the outputs among them

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


@dataclass(eq=False)
class Plan(ZLayer):
    """A layer's way to its diagonal, with what was recorded and verified for it."""

    way: str = "parameter-basis"
    slopes: list[Tensor | None] = field(default_factory=list)  # ∂L/∂z by call, differentiable
    checks: dict[str, bool] = field(default_factory=dict)
    residual: list[Tensor | None] = field(default_factory=list)  # ∂⟨w, f⟩/∂z by call, w = ∂L/∂f fixed
    values: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    num_columns: int = 0
    num_hvps: int = 0
    num_samples: int = 0
    converged: bool = True

    def layer_like(self, dtype: torch.dtype) -> Tensor:
        """An empty tensor of a dtype on the layer's device."""
        return next(iter(self.layer.parameters.values())).detach().new_empty(0, dtype=dtype)

    def exact_hvps(self) -> int:
        """Hessian-vector products of the cheapest exact way that the checks allow."""
        if self.way in ("unused", "columns"):
            return self.num_columns
        in_z = sum(self.sizes) if self.checks.get("samples_independent") else self.numel
        return min(in_z, self.numel)


# --------------------------------------------------------------------------------------------------------------------
# The plan: one forward and one differentiable backward, then the checks


def choose_ways(
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
        require_dependence(problem.loan.model, problem.loss_fn, problem.inputs, problem.targets)
    known = _linear_by_structure(problem, plans) if columns else []
    problem.outputs = sum(t.numel() for t in tensors_in(output) if t.requires_grad)
    problem.passed = problem.outputs + sum(t.numel() for t in tensors_in(list(recording.leaves.values())))
    second_order = len(known) < len(plans)
    candidates = _attach(problem, plans, recording, loss, create_graph=second_order)
    if columns and candidates:
        _columns(problem, output, loss, candidates, known, policy, dry)
        candidates = [plan for plan in candidates if plan.way != "columns"]
    if candidates and not second_order:
        candidates = _attach(problem, candidates, recording, loss, create_graph=True)
    count = problem.num_samples
    in_z = [p for p in candidates if sum(leaf.numel() for leaf in p.leaves) // count <= p.numel]
    if policy.method != "exact":  # draws go by z wherever they may
        in_z = candidates
    _verify_samples(problem, in_z)
    for plan in plans:
        if plan.way in ("unused", "columns"):
            continue
        by_z = plan in in_z and plan.checks["samples_independent"]
        if policy.affords(plan.exact_hvps(), problem.passed):
            plan.way = "z-basis" if by_z and sum(plan.sizes) <= plan.numel else "parameter-basis"
        else:
            plan.way = "z-draws" if by_z else "parameter-draws"


def _linear_by_structure(problem: Problem, plans: list[Plan]) -> list[Plan]:
    """The plans of layers after which the model is known to be piecewise linear, without a look at numbers."""
    model = problem.loan.model
    return [plan for plan in plans if problem.certain and linear_by_structure(model, plan.layer.module)]


def _attach(
    problem: Problem, plans: list[Plan], recording: Recording, loss: Tensor, *, create_graph: bool
) -> list[Plan]:
    """Give the plans their recorded calls and gradients; returns those that the own-use check allows in z-space."""
    unusable = recording.unusable()
    names = [plan.layer.name for plan in plans if plan.layer.name in recording.leaves]
    leaves = [leaf for name in names for leaf in recording.leaves[name]]
    ruled = [plan for plan in plans if plan.layer.rule is not None]
    stand_ins = [s for plan in ruled for s in problem.loan.stand_ins(plan.layer)]
    found: list[Tensor | None] = [None] * (len(leaves) + len(stand_ins))
    if loss.requires_grad:
        found = gradients(loss, leaves + stand_ins, create_graph=create_graph)
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
        [slope for plan in plans for slope in plan.slopes],
        [leaf for plan in plans for leaf in plan.leaves],
        [layout for plan in plans for layout in plan.layouts],
        problem.generator,
    )


# --------------------------------------------------------------------------------------------------------------------
# Columns: piecewise linear after the layer


def _columns(
    problem: Problem, output: Any, loss: Tensor, plans: list[Plan], known: list[Plan], policy: Policy, dry: bool
) -> None:
    """Finish the layers after which the model is piecewise linear; for others, split off what columns give exactly."""
    count = problem.num_samples
    if any(t.requires_grad and problem.dimension(t) is None for t in tensors_in(output)):
        return
    heads: list[Tensor] = []
    expose_output(output, heads, problem.dimension, detach=False)
    if not heads:
        return
    outputs = sum(t[0].numel() for t in heads)

    def worth_it(candidates: list[Plan]) -> bool:  # against the products of the layers' own bases, or draws
        bases = sum(min(sum(x.numel() for x in p.leaves) // count, p.numel) for p in candidates)
        return outputs <= (policy.num_samples if policy.method == "hutchinson" else bases) and (
            policy.method != "auto" or policy.affords(outputs, sum(f.numel() for f in heads))
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
    slopes = gradients(again, points, create_graph=True)
    for plan in known:
        plan.checks["piecewise_linear"] = True
    certified = known + _piecewise_linear(problem, heads, slopes, [p for p in plans if p not in known])
    served = plans if policy.method == "hutchinson" else certified  # the rest of these is drawn
    if not served or not worth_it(served):
        return
    pairs = known_roots(slopes, points)
    if pairs is None and not loss_separates(slopes, points, problem.generator):
        return
    if dry:
        for plan in certified:
            plan.way, plan.num_columns = "columns", outputs
        return
    pairs = pairs or signed_roots(slopes, points, problem.chunk_size)
    diagonals = contract_pairs(
        heads,
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
            plan.way = "columns"


def _piecewise_linear(
    problem: Problem, heads: list[Tensor], slopes: list[Tensor | None], plans: list[Plan]
) -> list[Plan]:
    """The plans with ∂²⟨w, f⟩/∂z² = 0 exactly, w = ∂L/∂f fixed."""
    if not plans:
        return []
    weighted = [(f, w.detach().requires_grad_(True)) for f, w in zip(heads, slopes, strict=True) if w is not None]
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


# --------------------------------------------------------------------------------------------------------------------
# Exact: the bases


def _in_z(problem: Problem, plans: list[Plan], policy: Policy) -> None:
    """The values of the plans that go by z, on the graph that was recorded."""
    exact = [plan for plan in plans if plan.way == "z-basis"]
    drawn = [plan for plan in plans if plan.way == "z-draws"]
    total = sum(sum(plan.sizes) for plan in exact) + policy.num_samples * len(drawn)
    with progress_bar(problem.progress and bool(total), "Hessian in z", total) as advance:
        for plan in exact:
            plan.values = _z_basis(problem, plan, advance)
            plan.slopes = plan.residual = []  # frees the graph as far as no other layer needs it
        for plan in drawn:
            _draw_in_z(problem, plan, policy, advance)
            plan.slopes = plan.residual = []


def _in_parameters(problem: Problem, plans: list[Plan], policy: Policy) -> None:
    """The values of the plans that go by the parameters, on a graph of their own."""
    rest = [plan for plan in plans if plan.way in ("parameter-basis", "parameter-draws")]
    total = sum(plan.numel if plan.way == "parameter-basis" else policy.num_samples for plan in rest)
    with progress_bar(problem.progress and bool(total), "Hessian on parameters", total) as advance:

        def work(plan: Plan, slopes: list[Tensor | None]) -> list[Tensor]:
            if plan.way == "parameter-basis":
                return _parameter_basis(problem, plan, slopes, advance)
            if plan.way == "parameter-draws":
                draw, size = parameter_draws(problem, plan, slopes)
                means, plan.errors = average(plan, policy, advance, draw, size)
                return means
            return []

        in_parameter_space(problem, rest, work)


def _in_z_elements(problem: Problem, plan: Plan) -> int:
    """Numbers that one product keeps at a time, about: what chunks are sized by."""
    return max(2 * sum(leaf.numel() for leaf in plan.leaves), problem.outputs)


def _on_parameters_elements(problem: Problem, plan: Plan) -> int:
    return max(4 * (plan.numel + sum(t.numel() for t in tensors_in(problem.inputs))), problem.passed)


def _z_basis(problem: Problem, plan: Plan, advance: Callable[[int], None], create_graph: bool = False) -> list[Tensor]:
    """The diagonal with v over the basis of one sample's outputs, all samples at once, call by call."""
    totals: list[Tensor] = zeros(plan.layer)
    size = default_chunk_size(_in_z_elements(problem, plan), plan.leaves[0], problem.chunk_size)
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


def in_parameter_space(
    problem: Problem,
    plans: list[Plan],
    work: Callable[[Plan, list[Tensor | None]], list[Tensor]],
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
    problem: Problem,
    plan: Plan,
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
    elements = _on_parameters_elements(problem, plan)
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


def _differentiable(problem: Problem, plans: list[Plan]) -> Diagonals:
    """The exact diagonal with a graph: the ways of the plan again, on a graph that reaches the parameters."""
    in_z = [plan for plan in plans if plan.way == "z-basis"]
    with recorded(problem.loan, [plan.layer for plan in in_z], own_parameters=True) as recording:
        _, loss = problem.loss()
        for plan in in_z:
            plan.inputs, plan.leaves = recording.inputs[plan.layer.name], recording.leaves[plan.layer.name]
            plan.with_graph = True
            plan.slopes = gradients(loss, plan.leaves, create_graph=True)
            plan.values = _z_basis(problem, plan, lambda _: None, create_graph=True)
    rest = [plan for plan in plans if plan.way == "parameter-basis"]
    in_parameter_space(
        problem, rest, lambda plan, g: _parameter_basis(problem, plan, g, lambda _: None, create_graph=True)
    )
    # A diagonal that happens to be constant must still be differentiable: its gradient is zero, not an error.
    tether = zero_tether(problem.loan.model)
    for plan in plans:
        plan.values = [value + tether for value in plan.values or zeros(plan.layer)]
    return _assemble(plans, detach=False)


def _assemble(plans: list[Plan], *, detach: bool = True) -> Diagonals:
    values = {p.layer.name: p.values or zeros(p.layer) for p in plans}
    if detach:
        values = {name: [v.detach() for v in parts] for name, parts in values.items()}
    info = {
        p.layer.name: LayerInfo(p.way, p.num_hvps, dict(p.checks), p.num_samples, _relative_error(p), p.converged)
        for p in plans
    }
    drawn = any(p.errors for p in plans)
    standard_error = {p.layer.name: p.errors or zeros(p.layer) for p in plans} if drawn else None
    return Diagonals([p.layer for p in plans], values, info, standard_error)


def _relative_error(plan: Plan) -> float:
    return relative_error(plan.values, plan.errors) if plan.errors else 0.0


# --------------------------------------------------------------------------------------------------------------------
# Hutchinson: unbiased estimates from random signs

#: Draws that decide whether the part that columns do not give is easier to estimate than the whole.
_PILOT = 4


def _draw_in_z(problem: Problem, plan: Plan, policy: Policy, advance: Callable[[int], None]) -> None:
    """Independent signs on every sample's z; on the residual alone where columns gave the rest and that pays."""
    draw, size = z_draws(problem, plan, plan.slopes)
    exact = plan.values  # the generalised Gauss-Newton part, or nothing
    if exact and policy.num_samples > 2 * _PILOT:
        draw_rest, _ = z_draws(problem, plan, plan.residual)
        whole, rest = draw(_PILOT), draw_rest(_PILOT)
        plan.num_hvps += 2 * _PILOT
        if sum(v.var(0).sum() for v in rest) < sum(v.var(0).sum() for v in whole):
            plan.way = "columns+z-draws"
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
    wanted = policy.num_samples
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
        plan.num_samples = seen
        if policy.rtol is None:
            break
        error = relative_error([m + k for m, k in zip(means, known, strict=True)], errors)
        plan.converged = error <= policy.rtol
        if plan.converged or seen >= policy.max_num_samples:
            break
        # The error falls with the root of the draws: go most of the way there.
        factor = min(4.0, max(1.2, (error / policy.rtol) ** 2))
        wanted = min(policy.max_num_samples, math.ceil(seen * factor))
    return [m + k for m, k in zip(means, known, strict=True)], errors


def relative_error(values: Sequence[Tensor], errors: Sequence[Tensor]) -> float:
    """``‖standard error‖ / ‖values‖`` of a layer; 0 where both vanish."""
    error = torch.cat([e.flatten() for e in errors]).norm().item()
    norm = torch.cat([v.flatten() for v in values]).norm().item()
    return 0.0 if error == 0 else error / norm if norm else math.inf


def z_draws(problem: Problem, plan: Plan, slopes: Sequence[Tensor | None]) -> tuple[Callable[[int], list[Tensor]], int]:
    def draw(count: int) -> list[Tensor]:
        vectors = [problem.signs((count, *leaf.shape), leaf) for leaf in plan.leaves]
        u, v = plan.gradients(stacked_vjp(slopes, plan.leaves, vectors)), plan.gradients(vectors)
        return [
            torch.stack([contract(_pick(u[name], k), _pick(v[name], k), numel=p.numel()) for k in range(count)])
            for name, p in plan.layer.parameters.items()
        ]

    elements = _in_z_elements(problem, plan) + plan.numel
    return draw, default_chunk_size(elements, plan.leaves[0], problem.chunk_size)


def _pick(gradient: PerSample, index: int) -> PerSample:
    return with_cotangents(gradient, lambda g: g[index])


def parameter_draws(
    problem: Problem, plan: Plan, slopes: list[Tensor | None]
) -> tuple[Callable[[int], list[Tensor]], int]:
    stand_ins = problem.loan.stand_ins(plan.layer)
    kind = compute_dtype(plan.layer)

    def draw(count: int) -> list[Tensor]:
        vectors = [problem.signs((count, *s.shape), s) for s in stand_ins]
        products = stacked_vjp(slopes, stand_ins, vectors)
        return [(u * v).reshape(count, -1).to(kind) for u, v in zip(products, vectors, strict=True)]

    elements = _on_parameters_elements(problem, plan)
    return draw, default_chunk_size(elements, stand_ins[0], problem.chunk_size)
