"""The Fisher of the user's own passes: what records bring is made into squares and added up.

The squares of a layer are added as soon as its gradient is complete, so that its inputs are freed while the backward
goes on; :meth:`OnlineFisher.add` closes a record when its backward has ended: what tied layers brought is put together,
layers that the loss does not depend on get their zeros, and the audit is compared.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._torch.autocast import autocast_state, no_autocast
from .._torch.engine import current_backward
from .._torch.versions import version
from ..errors import InvalidArgumentError, NonFiniteError
from ..layers.contraction import IN_PLACE_ELEMENTS, contract
from ..layers.dtypes import cast, compute_dtype
from ..layers.layout import DIM_ZERO, Layout
from ..layers.low_precision import Precision, is_low
from ..layers.norms import DenseNorms
from ..layers.patches import Patches
from ..layers.per_sample import Outer, PerSample, Rows, per_sample_gradients, with_cotangents
from ..layers.rules import takes_any_leading_dim
from ..layers.selection import Layer, sharded_parameter
from ..layers.uses import pieces
from ..oneshot.isolation import run_isolated
from ..parallel.fsdp import local, over_ranks
from .audit import Directions
from .norms import NormSums, add_norms, read_squares, take_norms, takes_norms
from .penalty import add_shared, explain
from .record import Backward, Backwards, Call, ForwardRecord, slot
from .reduction import Weights
from .rerun import rerun_gradients
from .sums import LayerSums, Stretch
from .troubles import Troubles
from .uncalled import Uncalled

__all__ = ["ADDING", "Accumulate", "OnlineFisher", "check_accumulate", "quietly", "total_of"]

#: What is summed up of a layer: the squares of each parameter's per-sample gradients, or their norms alone.
Accumulate = Literal["diagonal", "trace"]

_INTERRUPTED = (
    "adding a batch to its sums was broken off ({}), so that they hold a part of it: call reset(), or "
    "load_state_dict() with a state that was saved before."
)

_SECOND = (
    "it got its gradient in a second backward through one forward, after its samples were counted without it: add the "
    "losses and call backward once."
)

#: Where a diagonal is accumulated, norms of per-sample gradients are taken of the first batch and of one in so many.
ONE_IN = 32

#: Threads add to the sums one after the other.
ADDING = threading.Lock()


class OnlineFisher:
    """Σ of squared per-sample gradients of a model's layers, over the records of its forwards.

    See :class:`secorder.CurvatureProbe` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        *,
        reduction: Literal["mean", "sum"] | Weights,
        decay: float | None,
        strict: bool,
        loss_scale: Callable[[], float],
        returned: bool,
        on_nonfinite: Literal["skip", "raise", "keep"],
        forwards: Literal["separate", "joined"] | None,
        penalty: Literal["shared"] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        accumulate: Accumulate = "diagonal",
        precision: Precision = "auto",
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.reduction = reduction
        self.decay = decay
        self.loss_scale = loss_scale
        self.returned = returned  # whether it is the gradient on the loss that the model returns
        self.on_nonfinite = on_nonfinite
        self.forwards = forwards
        self.penalty = penalty
        self.device, self.dtype = device, dtype
        self.accumulate = accumulate
        self.precision = precision
        self.directions = Directions()
        self.backwards = Backwards()
        self._strict = strict
        self.others: deque[int] = deque(maxlen=8)  # backwards, the latest, that reached a forward that was not recorded
        self.assumed = ""  # of where samples are, to be said where the numbers are read
        self.reset()

    def fresh(self, accumulate: Accumulate | None = None) -> "OnlineFisher":
        """One with the same settings that has seen nothing, and accumulates the same unless it is told."""
        return OnlineFisher(
            self.model,
            self.layers,
            reduction=self.reduction,
            decay=None,
            strict=False,
            loss_scale=self.loss_scale,
            returned=self.returned,
            on_nonfinite=self.on_nonfinite,
            forwards=self.forwards,
            penalty=self.penalty,
            device=self.device,
            dtype=self.dtype,
            accumulate=accumulate or self.accumulate,
            precision=self.precision,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "backwards": Backwards()}

    def reset(self) -> None:
        """Forget everything accumulated."""
        #: A parameter that FSDP2 shards over the ranks, if any is: then sums and counts are those of all ranks.
        self.shard = sharded_parameter(self.layers)
        self.renew()
        self.failures = self.seen.new_zeros(len(self.layers), dtype=torch.long)  # of audits, by layer
        self.troubles = Troubles([layer.name for layer in self.layers], self._strict)
        self.earlier: Stretch | None = None  # what was accumulated before the last look at a window
        self.called: set[str] = set()  # layers, in some recorded forward
        self.uncalled = Uncalled()

    def renew(self) -> None:
        """Go on with empty sums."""
        diagonal = self.accumulate == "diagonal"
        self.sums = {x.name: LayerSums.empty(x, self.device, self.dtype, diagonal=diagonal) for x in self.layers}
        first = next(iter(self.sums.values())).counts.device
        device = torch.device("cpu") if first.type == "meta" else first
        self.norms = NormSums.empty(len(self.layers), device)
        self.seen = torch.zeros((), dtype=torch.float64, device=device)  # samples of all batches that count
        self.batches = 0
        self.elsewhere = 0.0  # samples that other ranks had seen when they were synchronised

    def follow(self) -> None:
        """Keep what is counted where the parameters are."""
        for layer in self.layers:
            self.sums[layer.name].follow(layer, self.device, self.dtype)
        first = self.sums[self.layers[0].name].counts
        if self.seen.device != first.device:
            self.seen = self.seen.to(first)
            self.norms = self.norms.to(first.device)
            self.failures = self.failures.to(first.device)

    # ---- what records bring

    def factor(self, record: ForwardRecord) -> float:
        """What squares of g are multiplied by to be squares of ∂ℓ_n/∂z_n."""
        scale = float(record.num_samples**2) if record.mean else 1.0
        return scale / float(self.loss_scale()) ** 2

    def of_all(self, record: ForwardRecord) -> int:
        """Samples of the batch on all ranks that share the sums."""
        return record.num_samples if self.shard is None else record.together

    def norms_due(self) -> bool:
        """Whether the norms of a backward's per-sample gradients are taken: of all, or of some where it costs more."""
        if self.penalty is not None:
            return False
        return self.accumulate == "trace" or not self.norms.added or self.directions.chance(ONE_IN)

    def count_of(self, record: ForwardRecord) -> float | Tensor:
        """Samples that a batch counts for: all of them, or those that have a weight."""
        return self.of_all(record) if record.counted is None else record.counted

    def deliver(self, records: Sequence[ForwardRecord], layer: Layer) -> None:
        """Add the squares of a layer's per-sample gradients: all its calls of one backward have come.

        Args:
            records: the forward, or those whose row n is one sample.
            layer: a layer with a rule.
        """
        record = records[0]
        came = [
            (call, one.layouts[layer.name][index][0], total)
            for one in records
            for index, call, total in sorted(one.captured.pop(layer.name, []), key=lambda found: found[0])
            if layer.name not in record.troubled
        ]
        if not came:
            return
        calls, layouts = [call for call, _, _ in came], [layout for _, layout, _ in came]
        forms = pieces(calls) if layer.by_operations else {}
        if layer.by_operations and any(len(forms.get(name, ())) != 1 for name in layer.parameters):
            self._deliver_pieces(record, layer, forms, [total for _, _, total in came])
            return
        gradients: Mapping[str, PerSample] = {name: own[0] for name, own in forms.items()}
        gradients = gradients or self._gradients(layer, calls, layouts)
        products = self._explain(record, layer, gradients)
        totals: list[Tensor | None] = [total for _, _, total in came]
        if record.weights is not None:
            gradients = {name: weighted(part, record.weights) for name, part in gradients.items()}
        record.received.add(layer.name)
        parts = [[gradients[name]] for name in layer.parameters]
        if record.attribution.sharing(layer.name):
            totals += [witness(part, products.get(name)) for name, part in gradients.items()]
            good = self._good(layer, totals) if self.accumulate == "diagonal" else None
            record.parts[layer.name] = (gradients, good)
            return
        if takes_norms(record):
            take_norms(self, record, layer, parts)
        if self.accumulate == "diagonal":
            self._add_formed(record, layer, gradients, products, totals)

    def _add_formed(
        self,
        record: ForwardRecord,
        layer: Layer,
        gradients: Mapping[str, PerSample],
        products: Mapping[str, Tensor],
        seen: list[Tensor | None],
    ) -> None:
        """Add a layer's squares; those that are formed apart anyway tell themselves whether they are finite.

        Args:
            record: of the forward.
            layer: the layer.
            gradients: of its parameters.
            products: what the audit made of them.
            seen: numbers that are finite where all of the layer's cotangents are.
        """
        parts: list[Tensor | Sequence[PerSample]] = []
        together = layer.sharded or self._low(record, layer)
        for name, p in layer.parameters.items():
            part = gradients[name]
            squares = None if together else squares_apart(part, p.numel())
            parts.append([part] if squares is None else squares)
            if self.on_nonfinite != "keep":
                seen.append(witness(part, products.get(name)) if squares is None else squares.amax())
        self._add_squares(record, layer, parts, self._good(layer, seen))

    def _deliver_pieces(
        self, record: ForwardRecord, layer: Layer, parts: dict[str, list[PerSample]], totals: list[Tensor]
    ) -> None:
        """The same for a layer that is measured by operations: several forms a parameter, none where it is not used."""
        seen = list(totals)
        for turn in range(max(map(len, parts.values()), default=0)):
            gradients = {name: forms[turn] for name, forms in parts.items() if turn < len(forms)}
            products = self._explain(record, layer, gradients)
            if self.on_nonfinite != "keep":
                seen += [w for n, p in gradients.items() if (w := witness(p, products.get(n))) is not None]
        good = self._good(layer, seen)
        if record.weights is not None:
            weights = record.weights
            parts = {name: [weighted(form, weights) for form in forms] for name, forms in parts.items()}
        record.received.add(layer.name)
        self._add(record, layer, [parts.get(name, []) for name in layer.parameters], good)

    def _gradients(self, layer: Layer, calls: list[Call], layouts: list[Layout]) -> Mapping[str, PerSample]:
        """Per-sample gradients of a layer with a rule."""
        assert layer.rule is not None
        kind = compute_dtype(layer)
        cleaned = []
        for index, (inputs, g) in enumerate(calls):
            inputs = tuple(cast(x if x.layout is torch.strided else x.to_dense(), kind) for x in inputs)
            g = cast(g, kind)
            if g.dim() == 1 and takes_any_leading_dim(layer.rule):  # one sample, without a dimension for it
                inputs, g, layouts[index] = tuple(x.unsqueeze(0) for x in inputs), g.unsqueeze(0), DIM_ZERO
            cleaned.append((inputs, g))
        return per_sample_gradients(layer.rule, layer.module, cleaned, layouts)

    def deliver_module(self, records: Sequence[ForwardRecord], key: Layer) -> None:
        """The same for layers that are parts of a module that is run again."""
        record = records[0]
        layers = [x for x in record.parts_of(key) if x.name not in record.troubled]
        calls = []
        for one in records:
            for call in one.modules.pop(key.name, []):
                call.layouts = one.layouts[key.name][call.index] if layers else []
                calls.append(call)
        if not layers or not calls:
            return
        totals = [total_of(g) for call in calls for g in call.gradients if g is not None]
        found: list[Any] = run_isolated(lambda direct: self._rerun(record, layers, calls, direct))
        for layer, (squares, norms) in zip(layers, found, strict=True):
            if norms is not None:
                record.norms[layer.name], record.squares[layer.name] = norms.told()
            if self.accumulate == "diagonal":
                self._add_squares(record, layer, squares, self._good(layer, totals + [own.sum() for own in squares]))
            record.received.add(layer.name)

    def _rerun(self, record: ForwardRecord, layers: list[Layer], calls: list[Any], direct: bool) -> list[Any]:
        """Σ of squares of each layer by parameter, and norms; the audit's side of them on the way."""
        found: list[tuple[list[Tensor], DenseNorms | None]] = [
            (
                [p.new_zeros(p.numel(), dtype=compute_dtype(layer)) for p in layer.parameters.values()]
                if self.accumulate == "diagonal"
                else [],
                DenseNorms() if takes_norms(record) else None,
            )
            for layer in layers
        ]
        at = 0
        for chunk in rerun_gradients(layers, calls, record.num_samples, direct=direct):
            for layer, (sums, norms), gradients in zip(layers, found, chunk, strict=True):
                self._explain(record, layer, dict(zip(layer.parameters, gradients, strict=True)))
                flats = [g.reshape(len(g), -1) for g in gradients]  # of a scalar, too
                if record.weights is not None:
                    flats = [flat * record.weights[at : at + len(flat), None].to(flat) for flat in flats]
                for total, flat in zip(sums, flats, strict=bool(sums)):
                    total.add_((flat * flat).sum(0))
                if norms is not None:
                    norms.add(flats)
            at += len(chunk[0][0]) if chunk and chunk[0] else 0
        return found

    def _add(
        self,
        record: ForwardRecord,
        layer: Layer,
        parts: Sequence[Sequence[PerSample]],
        good: Tensor | None,
    ) -> None:
        """Add what a layer's per-sample gradients bring, those of each layer that shares a parameter."""
        if takes_norms(record):
            take_norms(self, record, layer, parts)
        if self.accumulate == "diagonal":
            self._add_squares(record, layer, parts, good)

    def _add_squares(
        self, record: ForwardRecord, layer: Layer, parts: Sequence[Tensor | Sequence[PerSample]], good: Tensor | None
    ) -> None:
        """Add to each parameter's sum: Σ of squares, or those of the sum of per-sample gradients."""
        sums = self.sums[layer.name]
        alpha = self.factor(record)
        if self.decay is not None:
            alpha *= (1 - self.decay) / self.of_all(record)
        low = self._low(record, layer)
        before: list[int] = []
        try:
            with ADDING:
                before = [version(total) for total in sums.sums]
                sums.add(layer, parts, decay=self.decay, alpha=alpha, good=good, low=low)
                sums.count(self.count_of(record), good, self.decay, self.of_all(record))
            if good is not None:
                record.goods.append(good)
        except BaseException as error:  # out of memory, an interrupt: a part of the batch must not stay in unseen
            if before and before != [version(total) for total in sums.sums]:
                self.troubles.marks[layer.name] = _INTERRUPTED.format(type(error).__name__)
            raise

    def _low(self, record: ForwardRecord, layer: Layer) -> bool:
        """Whether the factors of a layer's squares are rounded to bfloat16."""
        first = next(iter(layer.parameters.values()))
        return is_low(self.precision, first.device, record.autocast_dtype or first.dtype)

    def _good(self, layer: Layer, totals: Sequence[Tensor | None]) -> Tensor | None:
        """Whether a layer's gradients are finite, by the sums of their elements; None where every batch counts."""
        if self.on_nonfinite == "keep" or not totals:
            return None
        first, *rest = [total for total in totals if total is not None]
        good = finite(sum((total if total.device == first.device else total.to(first) for total in rest), first))
        if self.shard is not None:  # all ranks leave the batch out, or none
            good = good.new_tensor(not over_ranks(float(not bool(good)), self.shard, "max"))
        if self.on_nonfinite == "raise" and not bool(good):
            raise NonFiniteError(
                f"the gradient at layer {layer.name!r} holds nan or inf: lower the learning rate or the loss scale, or "
                'pass on_nonfinite="skip" to leave such batches out.'
            )
        return good

    # ---- the audit

    def _explain(self, record: ForwardRecord, layer: Layer, gradients: Mapping[str, PerSample]) -> Mapping[str, Tensor]:
        """Tell the audit what a layer's gradients explain; the numbers, by parameter, where there are any."""
        if self.penalty is not None:
            explain(record, layer, gradients)
        elif record.backward is not None:
            return record.backward.audit.explain(layer.name, layer.parameters, gradients, record.autocast_dtype)
        return {}

    def _audit(self, backward: Backward) -> None:
        """Compare the whole gradients of a backward that has ended with what its records explain."""
        if not backward.alone:
            return  # what reached the parameters meanwhile may be another thread's
        troubled = {name for record in backward.records for name in record.troubled}
        chosen = [(i, layer) for i, layer in enumerate(self.layers) if layer.name not in troubled]
        tied = [record.attribution for record in backward.records if record.attribution.ties]
        asked = [
            (layer.parameters, {layer.name}.union(*(one.holders(layer.name) for one in tied))) for _, layer in chosen
        ]
        found = backward.audit.failures(asked)
        if found is not None:
            indices = [chosen[i][0] for i in found[0]]
            if indices == list(range(len(self.layers))):
                self.failures.add_(found[1])
            else:
                self.failures.index_add_(0, torch.tensor(indices, device=self.failures.device), found[1].long())

    def _audit_unreached(self, record: ForwardRecord, index: int) -> None:
        """A layer that no call brought a gradient of has none: not one that came before the audit could see it, either.

        A penalty's gradient is accumulated before the backward reaches the forward, and so is that of a derivative.
        """
        layer = self.layers[index]
        records = record.backward.records if record.backward is not None else [record]
        if any(layer.name in one.received for one in records) or layer.sharded:
            return
        for p, before in zip(layer.parameters.values(), record.slots.get(layer.name, ()), strict=False):
            if p.grad is not None and slot(p) != before:
                self.failures[index].add_((p.grad != 0).any())

    def audit_uncalled(self) -> None:
        """Layers that are trained by calls that no hook sees are not told."""
        for index, moved in self.uncalled.moved(self.layers, self.called) if self.batches or self.called else ():
            self.failures[index].add_(moved)

    # ---- the end of a backward

    def second_backward(self, record: ForwardRecord, names: Iterable[str], before: Tensor | None, now: Tensor) -> None:
        """A second backward reaches layers through a forward whose samples are counted.

        The same loss once more changes nothing: the forward is counted once. Another loss is to be told of.
        """
        owners = [own for name in names for own in record.attribution.owners(name) if own in self.sums]
        if before is None:
            self.troubles.mark(owners, _SECOND)
        else:
            names = [layer.name for layer in self.layers]
            for name in owners:
                self.failures[names.index(name)].add_(before != now)

    def check_together(self, backward: Backward, record: ForwardRecord) -> None:
        """Another forward takes part in a backward: are its samples its own, or those of the others?"""
        others = [one for one in backward.records if one is not record]
        same = [one for one in others if one.num_samples == record.num_samples]
        if not others or self.forwards == "separate" or (self.forwards is None and not same):
            return
        if self.forwards == "joined":
            if len(same) < len(others):
                self.troubles.mark(
                    record.calls,
                    'the forwards of one backward hold different numbers of samples, so that forwards="joined" cannot '
                    'be: say forwards="separate".',
                )
            return
        both = [name for name in record.calls if any(name in one.calls for one in same)]
        self.troubles.mark(
            [own for name in both for own in record.attribution.owners(name)],
            "one backward runs through several forwards of the model with as many samples each, and it cannot be seen "
            'whether row n of all of them is one sample: say forwards="joined" where it is (a siamese net, a rollout), '
            'or forwards="separate" where each forward has samples of its own.',
        )

    def unrecorded(self) -> None:
        """A gradient has come to a forward that was not recorded."""
        number = current_backward()
        if number is not None:
            self.others.append(number)

    def close(self, backward: Backward, records: Sequence[ForwardRecord]) -> None:
        """A backward has ended: add what its records still hold, and audit it."""
        if records and backward.number in self.others:
            self.troubles.mark(
                [own for record in records for name in record.calls for own in record.attribution.owners(name)],
                "one backward runs through several forwards of the model of which some are not recorded (every=), so "
                "that its gradients cannot be told apart: pass every=1, or call backward for each forward.",
            )
        read_squares(backward)
        groups = [list(records)] if self.forwards == "joined" and records else [[record] for record in records]
        for group in groups:
            for layer in group[0].attribution.layers:
                if any(layer.name in record.captured for record in group):
                    self.troubles.guarded(group[0], (layer.name,), self.deliver, group, layer)
            for key in dict.fromkeys(name for record in group for name in record.modules):
                parts = [x for x in (*group[0].fallback, *group[0].attribution.layers) if x.name == key]
                names = [x.name for x in group[0].parts_of(parts[0])]
                self.troubles.guarded(group[0], names, self.deliver_module, group, parts[0])
            for record in group[1:]:
                record.closed = True
            self.add(group[0])
        if self.penalty is None:
            self._audit(backward)
        elif len(groups) == 1 and len(groups[0]) == 1 and groups[0][0].weights is None:
            record = groups[0][0]
            inverse = float(record.num_samples) if record.mean else 1.0
            alpha = 1.0 if self.decay is None else (1 - self.decay) / record.num_samples
            scale = float(self.loss_scale())
            add_shared(self.layers, self.sums, backward, record, inverse=inverse, scale=scale, alpha=alpha)
        elif groups:
            self.troubles.mark(
                self.sums,
                'penalty="shared" goes with one forward for each backward, and with reduction="mean" or "sum".',
            )

    def add(self, record: ForwardRecord) -> None:
        """Close a record whose backward has ended: tied layers, zeros, counts."""
        record.closed = True
        self.called.update(record.calls)
        self._add_tied(record)
        zeros = []
        for index, layer in enumerate(self.layers):
            name = layer.name
            if name in record.received or name in record.troubled or name in record.without_gradient:
                continue
            if not any(p.requires_grad for p in layer.parameters.values()) and name not in record.calls:
                continue
            sums = self.sums[name]
            self._audit_unreached(record, index)
            if name not in self.called:  # nor has any forward before: where it is trained, that is by other calls
                for p in layer.parameters.values():
                    if p.requires_grad and p.grad is not None:
                        self.failures[index].add_(local(p.grad).abs().sum() != 0)
            zeros.append(name)
            if self.accumulate == "diagonal":
                with ADDING:
                    if self.decay is not None:
                        for total in sums.sums:
                            total.mul_(self.decay)
                    sums.count(self.count_of(record), None, self.decay, self.of_all(record))
        self.audit_uncalled()
        with ADDING:
            self.batches += 1
            good = self._add_norms(record, zeros) if takes_norms(record) else None
            self._count(record, good)

    def _add_norms(self, record: ForwardRecord, zeros: Sequence[str]) -> Tensor | None:
        """Add what the norms tell; where nothing else is accumulated, whether any layer is finite."""
        goods = add_norms(self, record, zeros)
        if self.accumulate != "trace":
            return None
        for name in (*record.norms, *zeros):  # it is they that count the batches
            self.sums[name].batches += 1
        return None if goods is None else goods.any()

    def _count(self, record: ForwardRecord, good: Tensor | None = None) -> None:
        """Count the samples of a batch, unless every layer left it out."""
        count = self.count_of(record)
        if good is not None:
            self.seen.add_(count * good.to(self.seen))
        elif len(record.goods) < len(self.layers):
            self.seen.add_(count)
        else:
            self.seen.add_(count * torch.stack([good.to(self.seen.device) for good in record.goods]).any())

    def _add_tied(self, record: ForwardRecord) -> None:
        """Add what the layers that share a parameter brought in this backward."""
        parts, record.parts = record.parts, {}
        for layer in self.layers:
            holders = record.attribution.ties.get(layer.name, {})
            brought = {
                local: [(parts[name], own) for name, own in by if name in parts] for local, by in holders.items()
            }
            here = [part for pairs in brought.values() for part, _ in pairs]
            if here and layer.name not in record.troubled:
                gradients = [[part[0][own] for part, own in brought[local]] for local in layer.parameters]
                goods = [good for _, good in here if good is not None]
                all_good = torch.stack(goods).all() if goods else None
                self._add(record, layer, gradients, all_good)
                record.received.add(layer.name)
            elif holders:
                record.received.discard(layer.name)


def check_accumulate(accumulate: str, penalty: str | None) -> None:
    """Refuse what cannot be accumulated.

    Raises:
        InvalidArgumentError: no such quantity, or norms where a penalty is to be added to each sample's gradient.
    """
    if accumulate not in ("diagonal", "trace"):
        raise InvalidArgumentError(f'accumulate must be "diagonal" or "trace", got {accumulate!r}.')
    if accumulate == "trace" and penalty is not None:
        raise InvalidArgumentError('penalty="shared" goes with accumulate="diagonal".')


def total_of(g: Tensor) -> Tensor:
    """The sum of a gradient's elements, which is finite where the squares of all of them are."""
    return g.sum(dtype=torch.promote_types(g.dtype, torch.float32))


def finite(number: Tensor) -> Tensor:
    """Whether it is finite: in a third of the time that ``isfinite`` takes, which looks twice."""
    return (number - number) == 0


def squares_apart(part: PerSample, numel: int) -> Tensor | None:
    """Σ_n of squares, in a tensor of its own, where they are formed in one anyway; else None."""
    if isinstance(part, Outer) and part.g.shape[-2] > 1 and numel <= IN_PLACE_ELEMENTS:
        return contract(part, numel=numel)
    return None


def witness(part: PerSample, product: Tensor | None) -> Tensor | None:
    """A number that is finite where what multiplies the cotangents is: an infinite input makes nan of a zero of them.

    Args:
        part: a per-sample gradient.
        product: what the audit made of it, if it did: it has seen all of the input.
    """
    if isinstance(part, Tensor):
        return total_of(part)
    if isinstance(part, Rows) or part.a is None:
        return None
    if isinstance(part.a, Patches):
        return total_of(part.a.image)
    return total_of(part.a) if product is None or product.dtype not in (torch.float32, torch.float64) else product


def weighted(part: PerSample, weights: Tensor) -> PerSample:
    """A per-sample gradient with each sample's multiplied by a number."""
    return with_cotangents(part, lambda g: g * weights.to(g).view(-1, *(1,) * (g.dim() - 1)))


def quietly(work: Callable[..., Any], *arguments: Any) -> None:
    """Do work that is not to be differentiated, in the dtypes that tensors have, inside of the user's backward."""
    if torch.is_grad_enabled() or autocast_state():
        with torch.no_grad(), no_autocast():
            work(*arguments)
    else:
        work(*arguments)
