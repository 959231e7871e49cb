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
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .._arguments import refuse_given, require_integer, require_one_of
from .._torch.differentiability import differentiable_zero
from .._torch.graph import collection_paused, is_builtin, users_of
from .._torch.modules import modules_in, own_parameters
from .._torch.pytree import tensors_in
from .._torch.vjp import gradients
from ..errors import CouplingError, DoubleBackwardError, InvalidArgumentError
from ..layers.dtypes import zeros
from ..layers.selection import Layer
from ..layers.structure import chain_of
from ..monitor.progress import progress_bar
from ..results import Diagonals, LayerInfo, Strategy
from .cotangents import require_linear_backward
from .fisher_by_loop import by_loop
from .fisher_by_samples import without_rules
from .fisher_by_uses import by_uses
from .fisher_by_weight import ByWeight, heaviest_columns
from .fisher_pairs import Asked, FisherType, Found, second_order_columns
from .head import contract_head, head_outputs, known_heads
from .hessian.budget import Budget
from .independence import exchange, outputs_independent
from .loss import require_dependence
from .losses_by_output import SampleLosses, losses_by_definition, losses_by_output
from .measurement import Measurement
from .output_hessian import as_samples, filled
from .recorded_layer import RecordedLayer, contract_pairs, settle, unsettled
from .recording import ChainForward, Recording, recorded, seen
from .roots import Columns, First, Root, Single
from .together import alone_as_together

#: Types of which a forward is one operation that has a rule, or moves beside it.
ONE_OPERATION = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.Embedding)

__all__ = ["fisher_diagonal"]


def check_fisher_type(fisher_type: str, num_draws: int) -> None:
    """Raise unless it is one of the three, with draws enough where it is drawn."""
    require_one_of("fisher_type", fisher_type, get_args(FisherType))
    require_integer("num_draws", num_draws, 1)
    if fisher_type != "mc" and num_draws != 1:
        refuse_given(
            f'goes with fisher_type="mc": fisher_type="{fisher_type}" draws no number of times.', num_draws=num_draws
        )


def fisher_budget(
    fisher_type: str, rtol: float | None, max_draws: int | None, *, create_graph: bool = False
) -> Budget | None:
    """How exact a Fisher by its heaviest columns is to be; None where no error is asked for."""
    if rtol is None:
        refuse_given("goes with rtol=, the error that draws go down to.", max_draws=max_draws)
        return None
    if fisher_type != "type-2" or create_graph:
        raise InvalidArgumentError('rtol goes with fisher_type="type-2", and not with create_graph=True.')
    return Budget.checked("hutchinson", None, rtol, max_draws, None)


def fisher_diagonal(task: Measurement, asked: Asked, budget: Budget | None = None) -> Diagonals:
    """The Fisher diagonal of one batch for every parameter of the layers.

    See :meth:`secorder.CurvatureProbe.fisher_diagonal`, which this function carries out.

    Args:
        budget: of ``"type-2"``, how exact: where it has an ``rtol``, columns by falling weight and draws of the rest.
    """
    weighted = None if budget is None else ByWeight(budget)
    found = fisher_means(task, asked, weighted)
    if task.create_graph:
        zero = differentiable_zero(task.model)
        values = {name: [v + zero for v in parts] for name, (parts, _) in found.items()}
    else:
        values = {name: [v.detach() if v.requires_grad else v for v in parts] for name, (parts, _) in found.items()}
    errors = None
    told = {} if weighted is None else {name: e.errors for name, e in weighted.estimates.items() if e.errors}
    if told:
        errors = {x.name: told.get(x.name, zeros(x)) for x in task.layers}
    infos = {name: info for name, (_, info) in found.items()}
    if asked.fisher_type == "mc":
        used = {name for name, info in infos.items() if info.strategy != Strategy.UNUSED}
        infos |= {name: replace(infos[name], num_draws=asked.num_draws, relative_error=nan) for name in used}
    return Diagonals(task.layers, values, infos, errors)


def fisher_means(task: Measurement, asked: Asked, weighted: ByWeight | None = None) -> Found:
    """The means over samples, of all layers: from the whole batch at once, or else sample by sample."""
    try:
        found = in_batches(task, asked, weighted)
    except DoubleBackwardError:  # of the checks; the definition needs one derivative
        found = {}
    rest = [layer for layer in task.layers if layer.name not in found]
    return found | (by_loop(task, rest, asked) if rest else {})


@dataclass
class Trial:
    """A Fisher of some columns alone, to see how long they take."""

    columns: int  #: how many
    of: int = 0  #: of how many, as it turned out

    def some(self, pairs: Columns) -> Columns:
        """The first ones."""
        self.of = pairs.num_columns
        return First(pairs, min(self.columns, self.of))


def in_batches(task: Measurement, asked: Asked, part: Trial | ByWeight | None = None) -> Found:
    """By the strategies that run the whole batch at once; layers that they do not serve are missing from the result.

    Of some columns alone, where there is such a ``part``.
    """
    if task.owned is not None:  # whose samples no dimension of the inputs holds
        return {}
    followed = _followed(task) if asked.one_pair else []  # of one pair, a trial is the whole
    with collection_paused() if asked.one_pair else nullcontext():  # over one forward, which makes many small objects
        found = _Batch(task, asked, part, followed).fisher()
        if found is None:
            return {}
        missed = [x for x in followed if x.rule is not None and x.name not in found]
        if missed:
            found |= _Batch(replace(task, layers=missed), asked, part, []).fisher() or {}
    return found


def _followed(task: Measurement) -> list[Layer]:
    """The layers that are followed by the operations that they consist of, all in one backward pass."""
    if task.certain or task.create_graph or task.num_samples == 1:
        return []
    return [x for x in task.layers if x.rule is None or type(x.module) in ONE_OPERATION]


class _Batch:
    """The Fisher by one forward of the whole batch; layers ``followed`` are followed through its graph."""

    output: Any
    loss: Tensor
    side: SampleLosses
    layers: list[RecordedLayer]  #: those that are not followed, as they were recorded
    by_graph: bool  #: whether the graph may be followed, which passes by its hooks
    pairs: Columns  #: the cotangents of every sample's loss on its output
    columns: Columns  #: those of them that are run

    def __init__(
        self, task: Measurement, asked: Asked, part: Trial | ByWeight | None, followed: Sequence[Layer]
    ) -> None:
        self.task, self.asked, self.part, self.followed = task, asked, part, followed
        self.tapped = [x for x in task.ruled if x not in followed]
        self.bare = _called_alone(task)
        self.traced = task.traced(inputs=not task.create_graph)

    def fisher(self) -> Found | None:
        """Of the layers that are served; None where the losses of samples are not told."""
        task = self.task
        tap = recorded(task.isolated, self.tapped, own_parameters=task.create_graph)
        with (
            nullcontext(Recording()) if self.bare else tap as recording,
            seen([x for x in self.followed if x.rule is not None]) as watched,
        ):
            self._forward(recording)
            recording.close()
            if not self.loss.requires_grad:
                require_dependence(task.model, task.loss_fn, task.inputs, task.targets)
                return {layer.name: (zeros(layer), LayerInfo(Strategy.UNUSED)) for layer in task.layers}
            self.layers = _usable(recording, self.tapped, with_graph=task.create_graph)
            self.by_graph = self.bare or not self.traced.hooked
            if not self._take_losses(loss_runs_again=bool(recording.without_graph or watched.without_graph)):
                return None
            self._require_linear_backward(recording)
            found = self._by_uses() | self._by_rules()
            recording.require_seen(self.loss)
            watched.require_seen(self.loss)
        if not (task.certain or self.traced.independent or self._shown_independent()):
            require_independent_samples(task, self.output)
        return found | self._rest(found)

    def _forward(self, recording: Recording) -> None:
        task = self.task
        if not self.bare:
            self.output, self.loss = task.loss(forward=self.traced)
            return
        onednn = task.isolated.pure and not task.autocast
        forward = ChainForward(recording, chain_of(task.model), self.tapped, onednn=onednn)
        self.output, self.loss = task.loss(forward=partial(task.isolated.run, forward))

    def _take_losses(self, *, loss_runs_again: bool) -> bool:
        """Find the losses of samples, and the pairs; whether they are told."""
        task, linear = self.task, self.asked.second_order
        side = None
        if self.by_graph:
            leaves = [leaf for z in self.layers for leaf in z.leaves]
            side = losses_by_definition(task, self.output, self.loss, leaves, second_order=linear)
        if side is None:
            if not loss_runs_again:
                self.loss = self.loss.detach()  # whose graph is as large as the output
            side = losses_by_output(task, self.output, self.loss, self.layers, second_order=linear)
        if side is None:
            return False
        self.side, self.pairs = side, _pairs(task, side, self.asked)
        side.gradients = []  # whose graph may be many times as large as the outputs
        self.columns = self.pairs if self.part is None else self.part.some(self.pairs)
        return True

    def _require_linear_backward(self, recording: Recording) -> None:
        """Raise where several cotangents of a sample are not multiplied by a Jacobian: PyTorch's operations do that."""
        task, outputs = self.task, self.side.model_outputs
        if task.certain or not self.asked.second_order or (self.by_graph and all(map(is_builtin, users_of(outputs)))):
            return
        ends = [leaf for leaves in recording.leaves.values() for leaf in leaves]
        ends += [s for layer in task.layers for s in task.isolated.replacements(layer)]
        require_linear_backward(outputs, ends, self.pairs, task.generator)

    def _by_uses(self) -> Found:
        """The layers that are followed."""
        if not self.followed or not self.by_graph:
            return {}
        outputs = self.side.model_outputs
        inner_sizes = self.traced.inner_sizes(outputs)
        return by_uses(self.task, self.followed, self.pairs, outputs, inner_sizes)

    def _by_rules(self) -> Found:
        """Layers whose rows belong to samples and whose parameters act there alone, through their outputs z."""
        if not self.layers:
            return {}
        task, outputs, columns = self.task, self.side.model_outputs, self.columns
        alone = self.layers if self.bare else _used_alone(task, outputs, self.layers)
        heads = _heads(task, outputs, alone, self.pairs)
        alone = [z for z in alone if z.layer.name not in heads]
        with progress_bar(task.progress and bool(alone), "Fisher", columns.num_columns, unit="vjps") as advance:
            pulled = settle(task, outputs, alone, columns, unsettled(task, outputs, alone, by_graph=self.by_graph))
            how: Any = {"alpha": 1 / task.num_samples, "advance": advance, "plain": self.side.at_leaves or pulled}
            found = contract_pairs(task, outputs, alone, columns, **how)
        info = LayerInfo(Strategy.RULE, checks={"own_use": True, "rows_are_samples": True})
        last = replace(info, checks={**info.checks, "last": True})
        told: Found = {name: (values, last) for name, values in heads.items()}
        return told | {
            z.layer.name: (values, info) for z, values in zip(alone, found, strict=True) if values is not None
        }

    def _shown_independent(self) -> bool:
        """Whether the graph, and what enters it without a gradient, show each output to depend on its sample alone."""
        task = self.task
        if task.num_samples < 3 or not all(t.requires_grad for t in tensors_in(self.output)):
            return False
        others = exchange(task.inputs, task.num_samples, task.sample_dim)
        inner_sizes = self.traced.inner_sizes(self.side.model_outputs)
        return others is not None and self.traced.follows(task.inputs, inner_sizes, *others)

    def _rest(self, found: Found) -> Found:
        """What is run after the layers that were found: layers without a rule, and all columns by their weight."""
        task = self.task
        rest = [x for x in task.layers if x.name not in found and (x.rule is None or x not in self.followed)]
        if isinstance(self.part, ByWeight) and isinstance(self.pairs, Root):
            served = [z for z in self.layers if z.layer.name in found and "last" not in found[z.layer.name][1].checks]
            outputs = self.side.model_outputs
            return heaviest_columns(task, outputs, self.pairs, served, rest, self.part, by_graph=self.by_graph)
        return without_rules(task, rest, self.columns, by_graph=self.by_graph and not self.followed)


def _usable(recording: Recording, layers: Sequence[Layer], *, with_graph: bool) -> list[RecordedLayer]:
    """The layers of which the recorded calls tell all."""
    unusable = recording.unusable()
    return [
        RecordedLayer(x, recording.inputs[x.name], recording.leaves[x.name], with_graph=with_graph)
        for x in layers
        if x.name in recording.leaves and x.name not in unusable
    ]


def _pairs(task: Measurement, side: SampleLosses, asked: Asked) -> Columns:
    """The cotangents of every sample's loss on its output."""
    if not asked.second_order:
        found = [as_samples(g) for g in filled(side.gradients, side.points)]
        return Single(found[0] if len(found) == 1 else torch.cat(found, 1))
    return second_order_columns(task, side.gradients, side.points, asked, side.root)


def _called_alone(task: Measurement) -> bool:
    """Whether a chain of PyTorch's own modules, without hooks, uses each parameter in one module's calls alone."""
    if not task.certain or task.create_graph or not isinstance(task.inputs, Tensor):
        return False
    held = [id(p) for m in modules_in(task.model) for p in own_parameters(m).values()]
    return len(set(held)) == len(held)


def _used_alone(
    task: Measurement, model_outputs: Sequence[Tensor], layers: Sequence[RecordedLayer]
) -> list[RecordedLayer]:
    """The layers whose parameters the model's outputs do not depend on but through their calls."""
    if task.create_graph:  # this forward used the parameters themselves: other uses show in one without them
        with recorded(task.isolated, [z.layer for z in layers], own_parameters=False) as recording:
            ends = [t for t in tensors_in(task.isolated.forward(task.inputs)) if t.requires_grad]
        layers = [z for z in layers if z.layer.name not in recording.with_others]
    else:
        ends = list(model_outputs)
    replacements = [s for z in layers for s in task.isolated.replacements(z.layer)]
    reached = gradients(ends, replacements, [torch.ones_like(f) for f in ends]) if ends else [None] * len(replacements)
    used = {id(s) for s, r in zip(replacements, reached, strict=True) if r is not None}
    return [z for z in layers if not any(id(s) in used for s in task.isolated.replacements(z.layer))]


def _heads(
    task: Measurement, model_outputs: Sequence[Tensor], layers: Sequence[RecordedLayer], pairs: Columns
) -> dict[str, list[Tensor]]:
    """The layers whose output is the model's, which need no columns."""
    if not isinstance(pairs, Root) or pairs.diagonal is None or task.create_graph:
        return {}
    which = known_heads(model_outputs, layers, head_outputs(model_outputs, layers, task.generator), pairs)
    return {
        z.layer.name: contract_head(z, model_outputs, which[z.layer.name], pairs, 1 / task.num_samples)
        for z in layers
        if z.layer.name in which
    }


def require_independent_samples(task: Measurement, output: Any) -> None:
    """Raise :class:`CouplingError` unless no sample of the batch influences another one's output."""
    forward = task.isolated.forward_in_full_precision
    known = None if task.autocast else output
    how: Any = task.isolated, task.inputs, task.num_samples, task.sample_dim, forward, known
    if not task.certain and not (alone_as_together(*how) and outputs_independent(*how)):
        raise CouplingError(
            "the samples of the batch influence one another's outputs (batch normalisation in train mode? samples "
            "not in dim 0, or an argument that they share, see sample_dim=?), so that per-sample gradients are not "
            "defined: call model.eval() or leave the layers before it out; hessian_diagonal stays exact."
        )
