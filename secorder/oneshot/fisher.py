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
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.autocast import autocast_state, under_autocast
from .._torch.failures import is_out_of_memory, is_vmap_failure
from .._torch.pytree import map_tensors, tensors_in
from .._torch.vjp import (
    check_chunk_size,
    chunks,
    default_chunk_size,
    fresh_generator,
    gradients,
    stacked_vjp,
    zero_tether,
)
from ..batch import batch_size, require_agreement
from ..errors import CouplingError, DoubleBackwardError, InvalidArgumentError
from ..layers.dtypes import compute_dtype, zeros
from ..layers.selection import Layer
from ..layers.structure import independent_by_structure
from ..results import Diagonals, LayerInfo
from .fisher_by_loop import by_loop
from .fisher_task import FisherType, Found, Task, collect, second_order_pairs
from .independence import outputs_independent
from .isolation import IsolatedModel, isolate, run_isolated
from .loss import check_loss, require_dependence
from .output_hessian import (
    Pairs,
    expose_output,
    loss_of_output,
    loss_separates,
)
from .recorded_layer import RecordedLayer, contract_pairs
from .recording import recorded

__all__ = ["FisherType", "Found", "Task", "collect", "fisher_diagonal", "second_order_pairs"]


def fisher_diagonal(
    model: nn.Module,
    layers: Sequence[Layer],
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    *,
    fisher_type: FisherType = "empirical",
    num_draws: int = 1,
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
    if num_draws < 1:
        raise InvalidArgumentError(f"num_draws must be at least 1, got {num_draws}.")
    check_chunk_size(chunk_size)
    count = batch_size(inputs, targets, sample_dim)
    generator = generator or fresh_generator()
    loss_fn = under_autocast(loss_fn)
    task = Task(
        model,
        layers,
        loss_fn,
        inputs,
        targets,
        count,
        sample_dim,
        fisher_type,
        num_draws,
        generator,
        create_graph,
        chunk_size,
        bool(autocast_state()),
        independent_by_structure(model, sample_dim),
    )
    found = run_isolated(lambda direct: _measure(task, direct))
    if create_graph:
        tether = zero_tether(model)
        values = {name: [v / count + tether for v in parts] for name, (parts, _) in found.items()}
    else:
        values = {name: [v.detach() / count for v in parts] for name, (parts, _) in found.items()}
    return Diagonals(layers, values, {name: info for name, (_, info) in found.items()})


def _measure(task: "Task", direct: bool) -> "Found":
    try:
        found = _batched(task, direct)
    except DoubleBackwardError:  # reentrant checkpoints only go with .backward(); anything else is named again there
        found = {}
    rest = [layer for layer in task.layers if layer.name not in found]
    return found | (by_loop(task, rest, direct) if rest else {})


def _batched(task: Task, direct: bool) -> Found:
    """The ways that run the whole batch at once; layers that they do not serve are missing from the result."""
    ruled = [layer for layer in task.layers if layer.rule is not None]
    with isolate(task.model, task.loss_fn, task.layers, create_graph=task.create_graph, direct=direct) as isolated:
        with recorded(isolated, ruled, own_parameters=task.create_graph) as recording:
            output = isolated.forward(task.inputs)
            require_agreement(output, task.targets, task.count, task.sample_dim)
            loss = check_loss(task.loss_fn(output, task.targets), isolated, task.inputs)
            recording.close()
            isolated.require_replacements((loss, output))
            if not loss.requires_grad:
                require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
                return {layer.name: (zeros(layer), LayerInfo("unused")) for layer in task.layers}
            if not any(t.requires_grad for t in tensors_in(output)):
                return {}
            if any(t.requires_grad and task.dimension(t) is None for t in tensors_in(output)):
                return {}
            unusable = recording.unusable()
            layers = [
                RecordedLayer(x, recording.inputs[x.name], recording.leaves[x.name], with_graph=task.create_graph)
                for x in ruled
                if x.name in recording.leaves and x.name not in unusable
            ]
            model_outputs: list[Tensor] = []
            output = expose_output(output, model_outputs, task.dimension, detach=False)
            pairs = _pairs(task, output, loss, model_outputs, isolated, layers)
            if pairs is None:
                return {}
            found = _by_rules(task, model_outputs, pairs, layers, isolated)
        rest = [layer for layer in task.layers if layer.name not in found]
        if not task.certain and not outputs_independent(
            isolated, task.inputs, task.count, task.sample_dim, isolated.forward_in_full_precision
        ):
            raise CouplingError(
                "the samples of the batch influence one another's outputs (batch normalisation in train mode? samples "
                "not in dim 0, see sample_dim=?), so that per-sample gradients are not defined: call model.eval() or "
                "leave the layers before it out; hessian_diagonal stays exact."
            )
        return found | (_by_samples(task, isolated, rest, pairs) if rest else {})


def _pairs(
    task: Task,
    output: Any,
    loss: Tensor,
    model_outputs: Sequence[Tensor],
    isolated: IsolatedModel,
    layers: Sequence[RecordedLayer],
) -> Pairs | None:
    """The cotangents of every sample's loss on its output, or None where the loss does not go by the output alone."""
    by_output = loss_of_output(task.loss_fn, output, task.targets, task.dimension, loss)
    if by_output is None:
        return None
    whole, points, exposed = by_output
    inside = [leaf for z in layers for leaf in z.leaves]
    inside += [s for layer in task.layers for s in isolated.replacements(layer)]
    output_gradients = gradients(whole, points, create_graph=True)
    if any(g is not None for g in gradients(whole, inside)):
        return None  # a weight penalty, or features taken from inside the model
    if all(g is None for g in output_gradients):
        require_dependence(isolated.model, task.loss_fn, task.inputs, task.targets)
    if not loss_separates(output_gradients, points, task.generator):
        raise CouplingError(
            "the loss couples the samples of a batch (a contrastive loss, a batch statistic), so that per-sample "
            "gradients are not defined: use a loss that is a mean or sum over samples; hessian_diagonal stays exact."
        )
    if task.create_graph:  # the cotangents must stay connected to the model
        points, exposed = list(model_outputs), output
    losses = _per_sample_losses(task, exposed)
    if task.fisher_type == "empirical":
        output_gradients = gradients(losses.sum(), points, create_graph=task.create_graph)
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(points, output_gradients, strict=True)]
        return Pairs(torch.cat([g.reshape(task.count, -1) for g in filled], 1)[None])
    return second_order_pairs(task, gradients(losses.sum(), points, create_graph=True), points)


def _per_sample_losses(task: Task, output: Any) -> Tensor:
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


def _by_rules(
    task: Task, model_outputs: Sequence[Tensor], pairs: Pairs, layers: Sequence[RecordedLayer], isolated: IsolatedModel
) -> Found:
    """Through the layers' outputs z, for layers whose rows belong to samples and whose parameters act there alone."""
    if task.create_graph:  # this forward used the parameters themselves: other uses show in one without them
        with recorded(isolated, [z.layer for z in layers], own_parameters=False):
            ends = [t for t in tensors_in(isolated.forward(task.inputs)) if t.requires_grad]
    else:
        ends = list(model_outputs)
    replacements = [s for z in layers for s in isolated.replacements(z.layer)]
    reached = gradients(ends, replacements, [torch.ones_like(f) for f in ends]) if ends else [None] * len(replacements)
    used = {id(s) for s, r in zip(replacements, reached, strict=True) if r is not None}
    alone = [z for z in layers if not any(id(s) in used for s in isolated.replacements(z.layer))]
    found = contract_pairs(
        model_outputs,
        alone,
        pairs,
        certain=task.certain,
        generator=task.generator,
        chunk_size=task.chunk_size,
        create_graph=task.create_graph,
    )
    info = LayerInfo("rule", checks={"own_use": True, "rows_are_samples": True})
    return {z.layer.name: (values, info) for z, values in zip(alone, found, strict=True) if values is not None}


def _by_samples(task: Task, isolated: IsolatedModel, layers: Sequence[Layer], pairs: Pairs) -> Found:
    """On the parameters: one vjp a sample and pair, on one graph of the whole batch."""
    model_outputs: list[Tensor] = []
    expose_output(isolated.forward(task.inputs), model_outputs, task.dimension, detach=False)
    replacements = [s for layer in layers for s in isolated.replacements(layer)]
    totals = [torch.zeros_like(s, dtype=compute_dtype(layer)) for layer in layers for s in isolated.replacements(layer)]
    elements = sum(s.numel() for s in replacements) + 4 * sum(f.numel() for f in model_outputs)
    size = default_chunk_size(elements, totals[0], task.chunk_size)
    sizes = [f[0].numel() for f in model_outputs]

    def pull_back(cotangent: Tensor, ids: range) -> list[Tensor]:
        alone = cotangent.new_zeros(len(ids), *cotangent.shape)
        alone[range(len(ids)), list(ids)] = cotangent[ids.start : ids.stop]
        split = zip(alone.split(sizes, 2), model_outputs, strict=True)
        found = stacked_vjp(
            model_outputs,
            replacements,
            [c.reshape(-1, *f.shape).to(f.dtype) for c, f in split],
            create_graph=task.create_graph,
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
    return collect(layers, totals, "per-sample")
