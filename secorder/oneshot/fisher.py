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
gradients do not exist, and :class:`~secorder.CouplingError` says so. Where the loss does not go by the model's output
alone (a weight penalty, the network inside of the loss), the model and the loss run on batches of one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._torch.pytree import tensors_in
from .._torch.vjp import gradients, zero_tether
from ..errors import CouplingError, DoubleBackwardError, InvalidArgumentError, NonFiniteError
from ..layers.dtypes import zeros
from ..layers.selection import Layer
from ..monitor.progress import progress_bar
from ..results import Diagonals, LayerInfo, Strategy
from .fisher_by_loop import by_loop
from .fisher_by_samples import by_samples
from .fisher_by_uses import by_uses
from .fisher_pairs import FisherType, Found, second_order_columns
from .head import contract_head, head_outputs, known_heads
from .heaviest import by_weight
from .hessian.budget import Budget
from .hessian.estimate import relative_error
from .independence import outputs_independent
from .known_losses import share_of_samples
from .loss import require_dependence
from .measurement import Measurement
from .output_hessian import as_samples, expose_output, filled, loss_of_output, loss_separates
from .recorded_layer import RecordedLayer, contract_pairs, contract_settled, require_linear_backward
from .recording import recorded
from .roots import Columns, First, Root, single
from .sample_losses import BatchLoss, gradients_of_losses, own_gradients, own_losses

__all__ = [
    "FisherType",
    "SampleLosses",
    "Trial",
    "check_fisher_type",
    "fisher_diagonal",
    "in_batches",
    "losses_by_output",
    "require_independent_samples",
]


def check_fisher_type(fisher_type: str, num_draws: int) -> None:
    """Raise unless it is one of the three, with draws enough.

    Raises:
        InvalidArgumentError: it is not.
    """
    if fisher_type not in ("empirical", "type-2", "mc"):
        raise InvalidArgumentError(f'fisher_type must be "empirical", "type-2" or "mc", got {fisher_type!r}.')
    if num_draws < 1:
        raise InvalidArgumentError(f"num_draws must be at least 1, got {num_draws}.")


def fisher_diagonal(
    task: Measurement, fisher_type: FisherType = "empirical", num_draws: int = 1, budget: Budget | None = None
) -> Diagonals:
    """The Fisher diagonal of one batch for every parameter of the layers.

    See :meth:`secorder.CurvatureProbe.fisher_diagonal`, which this function carries out.

    Args:
        task: the measurement.
        fisher_type: which.
        num_draws: draws of ``"mc"``.
        budget: of ``"type-2"``, how exact: where it has an ``rtol``, columns by falling weight and draws of the rest.
    """
    asked = fisher_type, num_draws
    weighted = None if budget is None else ByWeight(budget)
    try:
        found = in_batches(task, *asked, weighted=weighted)
    except DoubleBackwardError:  # of the checks; the definition needs one derivative
        found = {}
    rest = [layer for layer in task.layers if layer.name not in found]
    if rest:
        found |= by_loop(task, rest, *asked)
    count = task.num_samples
    if task.create_graph:
        tether = zero_tether(task.model)
        values = {name: [v / count + tether for v in parts] for name, (parts, _) in found.items()}
    else:
        values = {name: [v.detach().div_(count) for v in parts] for name, (parts, _) in found.items()}
    errors = None
    if weighted is not None and weighted.errors:
        errors = {x.name: [e / count for e in weighted.errors.get(x.name, zeros(x))] for x in task.layers}
    return Diagonals(task.layers, values, {name: info for name, (_, info) in found.items()}, errors)


@dataclass
class ByWeight:
    """A Fisher by its heaviest columns, and draws of the rest.

    Attributes:
        budget: how exact.
        errors: by layer, the standard errors by parameter of what was drawn, as it turned out.
    """

    budget: Budget
    errors: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass
class Trial:
    """A Fisher of some columns alone, to see how long they take.

    Attributes:
        columns: how many.
        of: of how many, as it turned out.
    """

    columns: int
    of: int = 0


def in_batches(
    task: Measurement,
    fisher_type: FisherType,
    num_draws: int,
    trial: Trial | None = None,
    weighted: ByWeight | None = None,
) -> Found:
    """The ways that run the whole batch at once; layers that they do not serve are missing from the result."""
    with recorded(task.isolated, task.ruled, own_parameters=task.create_graph) as recording:
        traced = task.traced(inputs=not task.create_graph)
        output, loss = task.loss(forward=traced)
        recording.close()
        if not loss.requires_grad:
            require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
            return {layer.name: (zeros(layer), LayerInfo(Strategy.UNUSED)) for layer in task.layers}
        unusable = recording.unusable()
        layers = [
            RecordedLayer(x, recording.inputs[x.name], recording.leaves[x.name], with_graph=task.create_graph)
            for x in task.ruled
            if x.name in recording.leaves and x.name not in unusable
        ]
        second_order = fisher_type != "empirical"
        side = None if traced.hooked else _losses_by_definition(task, output, loss, second_order=second_order)
        if side is None:
            loss = loss if recording.without_graph else loss.detach()  # whose graph is as large as the output
            side = losses_by_output(task, output, loss, layers, second_order=second_order)
        if side is None:
            return {}
        pairs = _pairs(task, side, fisher_type, num_draws)
        linear = fisher_type != "empirical"  # of which each sample has one cotangent alone
        if trial is not None:
            trial.of = pairs.num_columns
        if weighted is not None:
            trial = Trial(1)  # which finds out where samples are
        how: Any = {"linear": linear, "by_graph": not traced.hooked, "trial": trial}
        found = _by_rules(task, side.model_outputs, pairs, layers, **how)
        recording.require_seen(loss)
    rest = [layer for layer in task.layers if layer.name not in found]
    if not traced.independent:
        require_independent_samples(task, output)
    if weighted is not None and isinstance(pairs, Root):
        served = [z for z in layers if z.layer.name in found and "last" not in found[z.layer.name][1].checks]
        return found | _by_weight(task, side.model_outputs, pairs, served, rest, weighted)
    if rest and not traced.hooked:  # what is followed through the graph passes by its hooks
        found |= by_uses(task, rest, _some(pairs, trial), linear=linear)
        rest = [layer for layer in rest if layer.name not in found]
    return found | (by_samples(task, rest, _some(pairs, trial), linear=linear) if rest else {})


def require_independent_samples(task: Measurement, output: Any) -> None:
    """Raise unless no sample influences another one's output.

    Args:
        task: the measurement.
        output: of the batch.

    Raises:
        CouplingError: some do.
    """
    if not task.certain and not outputs_independent(
        task.isolated,
        task.inputs,
        task.num_samples,
        task.sample_dim,
        task.isolated.forward_in_full_precision,
        None if task.autocast else output,
    ):
        raise CouplingError(
            "the samples of the batch influence one another's outputs (batch normalisation in train mode? samples "
            "not in dim 0, see sample_dim=?), so that per-sample gradients are not defined: call model.eval() or "
            "leave the layers before it out; hessian_diagonal stays exact."
        )


@dataclass
class SampleLosses:
    """The losses ℓ_n of samples taken alone, as functions of the model's output, by their derivatives.

    Attributes:
        gradients: of Σ_n ℓ_n in ``points``; differentiable where second derivatives were asked for.
        points: what they were computed from, samples in dim 0.
        model_outputs: the model's output tensors in the same form.
    """

    gradients: list[Tensor | None]
    points: list[Tensor]
    model_outputs: list[Tensor]


def _losses_by_definition(task: Measurement, output: Any, loss: Tensor, *, second_order: bool) -> SampleLosses | None:
    """Of a loss of PyTorch's own that tells what a sample's part in it is, where no hook changes its gradient."""
    share = _precise_share(task, output)
    if share is None or not output.requires_grad:
        return None
    found = gradients(loss, [output], create_graph=second_order or task.create_graph)
    _require_finite(found)
    return SampleLosses(_divided(found, share), [output], [output])


def _precise_share(task: Measurement, output: Any) -> float | None:
    """The sample's share in the loss, unless what the loss computes with is half precision."""
    share = None if task.autocast else share_of_samples(task.loss_fn, output, task.targets, task.num_samples)
    return share if share is not None and torch.finfo(output.dtype).bits >= 32 else None


def losses_by_output(
    task: Measurement, output: Any, loss: Tensor, layers: Sequence[RecordedLayer], *, second_order: bool
) -> SampleLosses | None:
    """The losses of samples, where the batch's is made of them by the model's output alone; else None.

    Args:
        task: the measurement.
        output: the model's.
        loss: the batch's.
        layers: the recorded ones, from inside of which the loss must take nothing.
        second_order: whether second derivatives of the loss are to be those of samples too.

    Raises:
        CouplingError: the loss couples the samples.
        NonFiniteError: its gradient is nan or infinite.
        InvalidArgumentError: it holds tensors of the batch itself, or is random.
    """
    differentiable = [t for t in tensors_in(output) if t.requires_grad]
    if not differentiable or any(task.dimension(t) is None for t in differentiable):
        return None
    model_outputs: list[Tensor] = []
    connected = expose_output(output, model_outputs, task.dimension, detach=False)
    by_output = loss_of_output(task.loss_again, output, task.targets, task.dimension, loss)
    if by_output is None:
        return None
    batch = BatchLoss(*by_output)
    del by_output
    if task.enters_model(batch.loss, [leaf for z in layers for leaf in z.leaves]):
        return None  # a weight penalty, features taken from inside the model, the model itself
    if all(g is None for g in batch.gradients):
        require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
    _require_finite(batch.gradients)
    share = _precise_share(task, output)
    if share is None and not loss_separates(batch.gradients, batch.points, task.generator):
        raise CouplingError(
            "the loss couples the samples of a batch (a contrastive loss, a batch statistic), so that per-sample "
            "gradients are not defined: use a loss that is a mean or sum over samples; hessian_diagonal stays exact."
        )
    if share is None and task.create_graph:
        own_gradients(task, batch, second_order=second_order)  # for its checks
    if task.create_graph:  # the cotangents must stay connected to the model
        found = gradients_of_losses(own_losses(task, connected), model_outputs, create_graph=True)
        return SampleLosses(found, model_outputs, model_outputs)
    if share is None:
        return SampleLosses(own_gradients(task, batch, second_order=second_order), batch.points, model_outputs)
    return SampleLosses(_divided(batch.gradients, share), batch.points, model_outputs)


def _divided(found: Sequence[Tensor | None], share: float) -> list[Tensor | None]:
    return [g if g is None or share == 1 else g / share for g in found]


def _require_finite(found: Sequence[Tensor | None]) -> None:
    if not all(bool(g.detach().isfinite().all()) for g in found if g is not None):
        raise NonFiniteError(
            "the gradient of the loss in the model's output holds nan or infinite entries, though the loss is finite "
            "(a root or norm of zero, an overflow): there are no per-sample gradients here."
        )


def _pairs(task: Measurement, side: SampleLosses, fisher_type: FisherType, num_draws: int) -> Columns:
    """The cotangents of every sample's loss on its output."""
    if fisher_type == "empirical":
        return single(torch.cat([as_samples(g) for g in filled(side.gradients, side.points)], 1))
    return second_order_columns(task, side.gradients, side.points, fisher_type, num_draws)


def _by_rules(
    task: Measurement,
    model_outputs: Sequence[Tensor],
    pairs: Columns,
    layers: Sequence[RecordedLayer],
    *,
    linear: bool,
    by_graph: bool,
    trial: Trial | None,
) -> Found:
    """Through the layers' outputs z, for layers whose rows belong to samples and whose parameters act there alone."""
    if task.create_graph:  # this forward used the parameters themselves: other uses show in one without them
        with recorded(task.isolated, [z.layer for z in layers], own_parameters=False):
            ends = [t for t in tensors_in(task.isolated.forward(task.inputs)) if t.requires_grad]
    else:
        ends = list(model_outputs)
    replacements = [s for z in layers for s in task.isolated.replacements(z.layer)]
    reached = gradients(ends, replacements, [torch.ones_like(f) for f in ends]) if ends else [None] * len(replacements)
    used = {id(s) for s, r in zip(replacements, reached, strict=True) if r is not None}
    alone = [z for z in layers if not any(id(s) in used for s in task.isolated.replacements(z.layer))]
    heads = _heads(task, model_outputs, alone, pairs)
    alone = [z for z in alone if z.layer.name not in heads]
    columns = _some(pairs, trial)
    with progress_bar(task.progress and bool(alone), "Fisher", columns.num_columns, unit="vjps") as advance:
        found = contract_pairs(
            model_outputs,
            alone,
            columns,
            certain=task.certain,
            generator=task.generator,
            chunk_size=task.chunk_size,
            create_graph=task.create_graph,
            linear=linear,
            by_graph=by_graph,
            advance=advance,
        )
    info = LayerInfo(Strategy.RULE, checks={"own_use": True, "rows_are_samples": True})
    by_columns = {z.layer.name: values for z, values in zip(alone, found, strict=True) if values is not None}
    last = replace(info, checks={**info.checks, "last": True})
    return {name: (values, last) for name, values in heads.items()} | {
        name: (values, info) for name, values in by_columns.items()
    }


def _by_weight(
    task: Measurement,
    model_outputs: Sequence[Tensor],
    root: Root,
    served: Sequence[RecordedLayer],
    rest: Sequence[Layer],
    weighted: ByWeight,
) -> Found:
    """The heaviest columns, and draws of the others: of layers that are settled, and of the rest."""
    layers = [z.layer for z in served] + list(rest)
    if not layers:
        return {}
    if rest and not task.certain:
        outputs: list[Tensor] = []
        expose_output(task.isolated.forward(task.inputs), outputs, task.dimension, detach=False)
        replacements = [s for layer in rest for s in task.isolated.replacements(layer)]
        require_linear_backward(outputs, replacements, root, task.generator)

    def contract(columns: Columns) -> list[Tensor]:
        found = contract_settled(model_outputs, served, columns, chunk_size=task.chunk_size)
        values = [v.detach().flatten() for parts in found if parts is not None for v in parts]
        if rest:
            by_sample = by_samples(task, rest, columns, linear=False)
            values += [v.detach() for layer in rest for v in by_sample[layer.name][0]]
        return values

    with progress_bar(task.progress, "Fisher by weight", root.num_columns, unit="columns") as advance:
        estimate = by_weight(root, weighted.budget, contract, task.generator, advance)
    result: Found = {}
    values, errors = iter(estimate.values), iter(estimate.errors)
    for layer in layers:
        own = [next(values) for _ in layer.parameters]
        mine = [next(errors) for _ in layer.parameters] if estimate.errors else []
        if mine:
            weighted.errors[layer.name] = mine
        error = relative_error(own, mine) if mine else 0.0
        strategy = Strategy.PER_SAMPLE if layer in rest else Strategy.RULE
        told = estimate.num_draws, error, estimate.converged
        result[layer.name] = own, LayerInfo(strategy, 0, {"own_use": layer not in rest}, *told)
    return result


def _some(pairs: Columns, trial: Trial | None) -> Columns:
    return pairs if trial is None else First(pairs, min(trial.columns, pairs.num_columns))


def _heads(
    task: Measurement, model_outputs: Sequence[Tensor], layers: Sequence[RecordedLayer], pairs: Columns
) -> dict[str, list[Tensor]]:
    """The layers whose output is the model's, which need no columns."""
    if not isinstance(pairs, Root) or pairs.diagonal is None or task.create_graph:
        return {}
    which = known_heads(model_outputs, layers, head_outputs(model_outputs, layers, task.generator), pairs)
    return {
        z.layer.name: contract_head(z, model_outputs, which[z.layer.name], pairs)
        for z in layers
        if z.layer.name in which
    }
