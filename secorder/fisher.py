"""Fisher diagonals of a batch: which pairs (u, v) make them, and the checks that allow them.

With ℓ_n the loss of a batch that holds sample n alone and f_n the model's output for it:

- ``"empirical"``: (1/N) Σ_n (∂ℓ_n/∂θ)², u = v = ∂ℓ_n/∂z_n.
- ``"type-2"``: the diagonal of the generalised Gauss-Newton matrix, (1/N) Σ_n diag(J_nᵀ H_n J_n), H_n = ∂²ℓ_n/∂f_n²:
  u = Jᵀ s_c, v = sign_c u for each column of the signed square root H_n = Σ_c sign_c s_c s_cᵀ.
- ``"mc"``: an unbiased estimate of it with u = Jᵀ Σ_c ξ_c s_c, v = Jᵀ Σ_c ξ_c sign_c s_c, random signs ξ for each
  sample and draw.

The names are those of the literature (Kunstner, Balles, Hennig 2019, "Limitations of the empirical Fisher
approximation") and of curvlinops.

A layer's cotangents belong to samples only if a row of z influences its own sample's output alone. That is checked
with one more vjp: random cotangents on the outputs, weighted sample by sample with random factors, must come back
weighted by the same factors, to rounding. A coupling is missed only if it is below rounding. Where a layer fails for
its layout, each sample's gradient is taken on the parameters, one vjp a sample; where samples are coupled, per-sample
gradients do not exist, and :class:`~secorder.CouplingError` says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._torch.autocast import autocast_state, under_autocast
from ._torch.failures import is_out_of_memory, is_vmap_failure
from ._torch.pytree import map_tensors, tensors_in
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
from .errors import CouplingError, DoubleBackwardError, InvalidArgumentError
from .layers import Layer, select_layers
from .loan import Loan, borrow, check_loss, on_loan, recorded, require_dependence
from .samples import independent_by_structure, outputs_independent
from .zspace import (
    Pairs,
    ZLayer,
    compute_dtype,
    contract_pairs,
    expose_output,
    known_roots,
    loss_of_output,
    loss_separates,
    output_hessian,
    signed_roots,
    zeros,
)

__all__ = ["FisherType", "fisher_diagonal"]

FisherType = Literal["empirical", "type-2", "mc"]


def fisher_diagonal(
    model: nn.Module,
    layers: Sequence[Layer],
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    fisher_type: FisherType = "empirical",
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    create_graph: bool = False,
    chunk_size: int | None = None,
    sample_dim: int = 0,
) -> Diagonals:
    """The Fisher diagonal of one batch for every parameter of the layers.

    See :meth:`secorder.CurvatureProbe.fisher_diagonal`, which this function carries out.
    """
    if fisher_type not in ("empirical", "type-2", "mc"):
        raise InvalidArgumentError(f'fisher_type must be "empirical", "type-2" or "mc", got {fisher_type!r}.')
    if num_samples < 1:
        raise InvalidArgumentError(f"num_samples must be at least 1, got {num_samples}.")
    check_chunk_size(chunk_size)
    count = batch_size(inputs, targets, sample_dim)
    generator = generator or fresh_generator()
    loss_fn = under_autocast(loss_fn)
    task = _Task(
        model,
        layers,
        loss_fn,
        inputs,
        targets,
        count,
        sample_dim,
        fisher_type,
        num_samples,
        generator,
        create_graph,
        chunk_size,
        bool(autocast_state()),
        independent_by_structure(model, sample_dim),
    )
    found = on_loan(lambda direct: _measure(task, direct))
    if create_graph:
        tether = zero_tether(model)
        values = {name: [v / count + tether for v in parts] for name, (parts, _) in found.items()}
    else:
        values = {name: [v.detach() / count for v in parts] for name, (parts, _) in found.items()}
    return Diagonals(layers, values, {name: info for name, (_, info) in found.items()})


def _measure(task: "_Task", direct: bool) -> "_Found":
    try:
        found = _batched(task, direct)
    except DoubleBackwardError:  # reentrant checkpoints only go with .backward(); anything else is named again there
        found = {}
    rest = [layer for layer in task.layers if layer.name not in found]
    return found | (_by_loop(task, rest, direct) if rest else {})


@dataclass(frozen=True)
class _Task:
    """One measurement, as asked for."""

    model: nn.Module
    layers: Sequence[Layer]
    loss_fn: Callable[[Any, Any], Tensor]
    inputs: Any
    targets: Any
    count: int
    sample_dim: int
    fisher_type: FisherType
    num_samples: int
    generator: torch.Generator
    create_graph: bool
    chunk_size: int | None
    autocast: bool
    certain: bool  # samples are independent by the model's structure

    def dimension(self, tensor: Tensor) -> int | None:
        """Where a tensor's samples are; what has none is shared by all samples."""
        return sample_dimension(tensor, self.count, self.sample_dim)

    def cut(self, tree: Any, index: int, *, rows: bool = False) -> Any:
        """The batch that holds one sample alone.

        With ``rows``, tensors may hold several rows a sample in dim 0, sample after sample (a label for each token).
        """

        def one(tensor: Tensor) -> Tensor:
            dim = self.dimension(tensor)
            if dim is not None:
                return tensor.narrow(dim, index, 1)
            if rows and tensor.dim() and tensor.shape[0] % self.count == 0:
                size = tensor.shape[0] // self.count
                return tensor.narrow(0, index * size, size)
            return tensor

        return map_tensors(one, tree)


_Found = dict[str, tuple[list[Tensor], LayerInfo]]


def _batched(task: _Task, direct: bool) -> _Found:
    """The ways that run the whole batch at once; layers that they do not serve are missing from the result."""
    ruled = [layer for layer in task.layers if layer.rule is not None]
    with borrow(task.model, task.loss_fn, task.layers, create_graph=task.create_graph, direct=direct) as loan:
        with recorded(loan, ruled, own_parameters=task.create_graph) as recording:
            output = loan.forward(task.inputs)
            require_agreement(output, task.targets, task.count, task.sample_dim)
            loss = check_loss(task.loss_fn(output, task.targets), loan, task.inputs)
            recording.close()
            loan.require_stand_ins((loss, output))
            if not loss.requires_grad:
                require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
                return {layer.name: (zeros(layer), LayerInfo("unused")) for layer in task.layers}
            if not any(t.requires_grad for t in tensors_in(output)):
                return {}
            if any(t.requires_grad and task.dimension(t) is None for t in tensors_in(output)):
                return {}
            unusable = recording.unusable()
            layers = [
                ZLayer(x, recording.inputs[x.name], recording.leaves[x.name], with_graph=task.create_graph)
                for x in ruled
                if x.name in recording.leaves and x.name not in unusable
            ]
            heads: list[Tensor] = []
            output = expose_output(output, heads, task.dimension, detach=False)
            pairs = _pairs(task, output, loss, heads, loan, layers)
            if pairs is None:
                return {}
            found = _by_rules(task, heads, pairs, layers, loan)
        rest = [layer for layer in task.layers if layer.name not in found]
        if not task.certain and not outputs_independent(
            loan, task.inputs, task.count, task.sample_dim, loan.forward_in_full_precision
        ):
            raise CouplingError(
                "the samples of the batch influence one another's outputs (batch normalisation in train mode? samples "
                "not in dim 0, see sample_dim=?), so that per-sample gradients are not defined: call model.eval() or "
                "leave the layers before it out; hessian_diagonal stays exact."
            )
        return found | (_by_samples(task, loan, rest, pairs) if rest else {})


# --------------------------------------------------------------------------------------------------------------------
# Pairs of cotangents on the output


def _pairs(
    task: _Task, output: Any, loss: Tensor, heads: Sequence[Tensor], loan: Loan, layers: Sequence[ZLayer]
) -> Pairs | None:
    """The cotangents of every sample's loss on its output, or None where the loss does not go by the output alone."""
    by_output = loss_of_output(task.loss_fn, output, task.targets, task.dimension, loss)
    if by_output is None:
        return None
    whole, points, exposed = by_output
    inside = [leaf for z in layers for leaf in z.leaves]
    inside += [s for layer in task.layers for s in loan.stand_ins(layer)]
    slopes = gradients(whole, points, create_graph=True)
    if any(g is not None for g in gradients(whole, inside)):
        return None  # a weight penalty, or features taken from inside the model
    if all(g is None for g in slopes):
        require_dependence(loan.model, task.loss_fn, task.inputs, task.targets)
    if not loss_separates(slopes, points, task.generator):
        raise CouplingError(
            "the loss couples the samples of a batch (a contrastive loss, a batch statistic), so that per-sample "
            "gradients are not defined: use a loss that is a mean or sum over samples; hessian_diagonal stays exact."
        )
    if task.create_graph:  # the cotangents must stay connected to the model
        points, exposed = list(heads), output
    losses = _per_sample_losses(task, exposed)
    if task.fisher_type == "empirical":
        slopes = gradients(losses.sum(), points, create_graph=task.create_graph)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(points, slopes, strict=True)]
        return Pairs(torch.cat([g.reshape(task.count, -1) for g in filled], 1)[None])
    return _second_order_pairs(task, gradients(losses.sum(), points, create_graph=True), points)


def _second_order_pairs(task: _Task, slopes: Sequence[Tensor | None], points: Sequence[Tensor]) -> Pairs:
    if task.create_graph:  # a square root is not differentiable where eigenvalues meet: u = e_c, v = H e_c
        hessian = output_hessian(slopes, points, task.chunk_size, create_graph=True)
        eye = torch.eye(hessian.shape[-1]).to(hessian)
        pairs = Pairs(eye[:, None].expand(-1, len(hessian), -1), hessian.permute(1, 0, 2))
    else:
        pairs = known_roots(slopes, points) or signed_roots(slopes, points, task.chunk_size)
    return pairs if task.fisher_type == "type-2" else _drawn(task, pairs)


def _drawn(task: _Task, pairs: Pairs) -> Pairs:
    """Monte Carlo: random signs mix all columns into one pair, drawn anew for each sample and draw."""
    shape = (task.num_samples, *pairs.u.shape[:2])
    signs = torch.randint(0, 2, shape, generator=task.generator, device=task.generator.device)
    signs = (signs * 2 - 1).to(pairs.u) / task.num_samples**0.5
    u = torch.einsum("mkn,kno->mno", signs, pairs.u)
    other = pairs.v if pairs.sign is None else pairs.u * pairs.sign[..., None]
    return Pairs(u, None if other is None else torch.einsum("mkn,kno->mno", signs, other))


def _per_sample_losses(task: _Task, output: Any) -> Tensor:
    """ℓ_n, shape (N,): the loss of batches of one, each made of one sample's output and target."""
    tensors = list(tensors_in((output, task.targets)))
    dims = [task.dimension(t) for t in tensors]
    per_sample = [t for t, dim in zip(tensors, dims, strict=True) if dim is not None]
    kept = [dim for dim in dims if dim is not None]

    def one(*samples: Tensor) -> Tensor:
        rest = iter(zip(samples, kept, strict=True))

        def alone(tensor: Tensor) -> Tensor:
            if task.dimension(tensor) is None:
                return tensor
            sample, dim = next(rest)
            return sample.unsqueeze(dim)

        return task.loss_fn(*map_tensors(alone, (output, task.targets))).reshape(())

    if not task.autocast:  # whose casts differ inside of vmap (cross entropy stays in half precision)
        try:
            return torch.vmap(one, in_dims=tuple(kept))(*per_sample)
        except RuntimeError as error:  # control flow by value, or an operator without a batching rule
            if not is_out_of_memory(error) and not is_vmap_failure(error):
                raise
    return torch.stack(
        [one(*(t.select(dim, n) for t, dim in zip(per_sample, kept, strict=True))) for n in range(task.count)]
    )


# --------------------------------------------------------------------------------------------------------------------
# Three ways to the per-sample gradients


def _by_rules(task: _Task, heads: Sequence[Tensor], pairs: Pairs, layers: Sequence[ZLayer], loan: Loan) -> _Found:
    """Through the layers' outputs z, for layers whose rows belong to samples and whose parameters act there alone."""
    if task.create_graph:  # this forward used the parameters themselves: other uses show in one without them
        with recorded(loan, [z.layer for z in layers], own_parameters=False):
            ends = [t for t in tensors_in(loan.forward(task.inputs)) if t.requires_grad]
    else:
        ends = list(heads)
    stand_ins = [s for z in layers for s in loan.stand_ins(z.layer)]
    reached = gradients(ends, stand_ins, [torch.ones_like(f) for f in ends]) if ends else [None] * len(stand_ins)
    used = {id(s) for s, r in zip(stand_ins, reached, strict=True) if r is not None}
    alone = [z for z in layers if not any(id(s) in used for s in loan.stand_ins(z.layer))]
    found = contract_pairs(
        heads,
        alone,
        pairs,
        certain=task.certain,
        generator=task.generator,
        chunk_size=task.chunk_size,
        create_graph=task.create_graph,
    )
    info = LayerInfo("rule", checks={"own_use": True, "rows_are_samples": True})
    return {z.layer.name: (values, info) for z, values in zip(alone, found, strict=True) if values is not None}


def _by_samples(task: _Task, loan: Loan, layers: Sequence[Layer], pairs: Pairs) -> _Found:
    """On the parameters: one vjp a sample and pair, on one graph of the whole batch."""
    heads: list[Tensor] = []
    expose_output(loan.forward(task.inputs), heads, task.dimension, detach=False)
    stand_ins = [s for layer in layers for s in loan.stand_ins(layer)]
    totals = [torch.zeros_like(s, dtype=compute_dtype(layer)) for layer in layers for s in loan.stand_ins(layer)]
    elements = sum(s.numel() for s in stand_ins) + 4 * sum(f.numel() for f in heads)
    size = default_chunk_size(elements, totals[0], task.chunk_size)
    sizes = [f[0].numel() for f in heads]

    def pull_back(cotangent: Tensor, ids: range) -> list[Tensor]:
        alone = cotangent.new_zeros(len(ids), *cotangent.shape)
        alone[range(len(ids)), list(ids)] = cotangent[ids.start : ids.stop]
        split = zip(alone.split(sizes, 2), heads, strict=True)
        found = stacked_vjp(
            heads, stand_ins, [c.reshape(-1, *f.shape).to(f.dtype) for c, f in split], create_graph=task.create_graph
        )
        return [g.to(total.dtype) for g, total in zip(found, totals, strict=True)]

    for k in range(len(pairs.u)):
        for ids in chunks(task.count, size):
            left = pull_back(pairs.u[k], ids)
            right = left if pairs.v is None else pull_back(pairs.v[k], ids)
            sign = None if pairs.sign is None else pairs.sign[k, ids.start : ids.stop]
            for index, (u, v) in enumerate(zip(left, right, strict=True)):
                weighted = v if sign is None else v * sign.view(-1, *(1,) * (v.dim() - 1))
                totals[index] = totals[index] + (u * weighted).sum(0)
    return _collect(layers, totals, "per-sample")


def _collect(layers: Sequence[Layer], totals: Sequence[Tensor], way: str) -> _Found:
    rest = iter(totals)
    return {layer.name: ([next(rest).flatten() for _ in layer.parameters], LayerInfo(way)) for layer in layers}


def _by_loop(task: _Task, layers: Sequence[Layer], direct: bool) -> _Found:
    """By definition: the model and the loss on batches of one, for outputs that cannot be cut into samples."""
    totals = [total for layer in layers for total in zeros(layer)]
    losses = []
    # Stand-ins for all parameters: reentrant checkpoints run under .backward() only, which accumulates into each.
    everything = select_layers(task.model, "all", unchecked=True)
    with borrow(task.model, task.loss_fn, everything, create_graph=task.create_graph, direct=direct) as loan:
        stand_ins = [loan.stand_in(p) for layer in layers for p in layer.parameters.values()]
        output = loan.forward(task.inputs)
        require_agreement(output, task.targets, task.count, task.sample_dim)
        whole = check_loss(task.loss_fn(output, task.targets), loan, task.inputs)
        loan.require_stand_ins(whole)
        if not whole.requires_grad:
            require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
        for n in range(task.count):
            output = loan.forward(task.cut(task.inputs, n))
            loss = task.loss_fn(output, task.cut(task.targets, n, rows=True)).reshape(())
            losses.append(loss.detach())
            for u, v in _one_sample(task, loan, output, loss, n, stand_ins):
                for index, total in enumerate(totals):
                    totals[index] = total + u[index].to(total).flatten() * v[index].to(total).flatten()
    whole = whole.detach()
    mean, total_loss = torch.stack(losses).mean(), torch.stack(losses).sum()
    if not any(torch.allclose(whole, x, rtol=1024 * torch.finfo(whole.dtype).eps) for x in (mean, total_loss)):
        raise CouplingError(
            f"the loss of the batch ({whole.item():.6g}) is neither the mean nor the sum of the losses of its samples "
            f"taken alone ({mean.item():.6g}, {total_loss.item():.6g}): samples are coupled, or the model is random; "
            "call model.eval(), or pass a loss_fn that works on the model's output."
        )
    return _collect(layers, totals, "loop")


def _one_sample(
    task: _Task, loan: Loan, output: Any, loss: Tensor, index: int, stand_ins: list[Tensor]
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The pairs of gradients on the parameters that one sample contributes."""
    if task.fisher_type == "empirical":
        g = _parameter_gradients(task, loss, stand_ins)
        return [(g, g)]
    points: list[Tensor] = []
    again = task.loss_fn(expose_output(output, points, None, detach=True), task.cut(task.targets, index, rows=True))
    heads = [t for t in tensors_in(output) if t.requires_grad]
    slopes = gradients(again, points, create_graph=True) if again.requires_grad else [None] * len(points)
    if any(f.dim() == 0 and g is not None for f, g in zip(heads, slopes, strict=True)) or (
        again.requires_grad and any(g is not None for g in gradients(again, stand_ins))
    ):
        raise InvalidArgumentError(
            f"fisher_type={task.fisher_type!r} needs a loss that is computed by loss_fn from the model's output: "
            "here it comes from inside the model."
        )
    pairs = _second_order_pairs(task, slopes, points)
    sizes = [f.numel() for f in heads]

    def pull_back(stack: Tensor) -> list[Tensor]:
        split = zip(stack[:, 0].split(sizes, 1), heads, strict=True)
        return stacked_vjp(
            heads, stand_ins, [c.reshape(-1, *f.shape) for c, f in split], create_graph=task.create_graph
        )

    u = pull_back(pairs.u)
    v = u if pairs.v is None and pairs.sign is None else pull_back(pairs.v if pairs.v is not None else pairs.u)
    factor = [1.0] * len(pairs.u) if pairs.sign is None else pairs.sign[:, 0].tolist()
    return [([x[k] * factor[k] for x in u], [x[k] for x in v]) for k in range(len(pairs.u))]


def _parameter_gradients(task: _Task, loss: Tensor, stand_ins: list[Tensor]) -> list[Tensor]:
    try:
        found = gradients(loss, stand_ins, create_graph=task.create_graph)
    except DoubleBackwardError:  # reentrant checkpoints: .backward(), which reaches .grad, so on stand-ins only
        if task.create_graph or any(isinstance(s, nn.Parameter) for s in stand_ins):
            raise
        loss.backward()
        found = [s.grad for s in stand_ins]
        for s in stand_ins:
            s.grad = None
    return [torch.zeros_like(s) if g is None else g for s, g in zip(stand_ins, found, strict=True)]
