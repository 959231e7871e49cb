"""The Fisher of the user's own passes: contributions of records, checked, added up, and told when they are asked for.

The squares of a layer are added as soon as its gradient is complete, so that its inputs are freed while the backward
goes on; :meth:`OnlineFisher.add` closes a record when its backward has ended: what tied layers brought is put together,
layers that the loss does not depend on get their zeros, and the audit is compared.
"""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._torch.autocast import autocast_state, no_autocast
from .._torch.engine import current_backward, in_backward
from .._torch.saved_tensors import stops_recomputation
from .._torch.versions import version
from ..errors import AttributionError, CurvatureWarning, NonFiniteError, ProbeStateError, SecorderError
from ..layers.dtypes import cast, compute_dtype
from ..layers.layout import DIM_ZERO, Layout
from ..layers.per_sample import PerSample, per_sample_gradients, with_cotangents
from ..layers.rules import takes_any_leading_dim
from ..layers.selection import Layer, sharded_parameter
from ..oneshot.isolation import run_isolated
from ..parallel.fsdp import over_ranks
from ..results import Diagonals, LayerInfo
from .audit import Signs, allowed, explained
from .record import Backward, Call, ForwardRecord, slot
from .reduction import Weights
from .rerun import rerun_gradients
from .sums import LayerSums

__all__ = ["AUDITED", "OUTSIDE", "OnlineFisher", "quietly", "total_of"]

#: Why a layer has no online Fisher.
OUTSIDE = (
    "its parameters get gradient from outside of the layer's calls (a tied weight, a weight penalty in the loss, a use "
    "such "
    "as F.linear(x, layer.weight), a derivative that the model takes of itself, or another loss in a second backward "
    "through one forward), which belongs to no sample that a hook can see; what was accumulated since the last check "
    "that passed may hold some of it: leave the layer out with layers=, or measure it with a one-shot call."
)

_INTERRUPTED = (
    "adding a batch to its sums was broken off ({}), so that they hold a part of it: call reset(), or "
    "load_state_dict() "
    "with a state that was saved before."
)

_SECOND = (
    "it got its gradient in a second backward through one forward, after its samples were counted without it: add the "
    "losses and call backward once."
)

#: Layers that one audit looks at: small models whole, large ones by a few layers, drawn anew each time.
AUDITED = 32


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
        loss_scale: Any,
        on_nonfinite: Literal["skip", "raise", "keep"],
        forwards: Literal["separate", "joined"] | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.reduction = reduction
        self.decay = decay
        self.strict = strict
        self.loss_scale = loss_scale
        self.on_nonfinite = on_nonfinite
        self.forwards = forwards
        self.device, self.dtype = device, dtype
        self.signs = Signs()
        self.causes: dict[str, int] = {}  # what the hooks saw, for the case that nothing is accumulated
        self.assumed = ""  # of where samples are, to be said where the numbers are read
        self.backwards: dict[int, Backward] = {}  # those that run, by the engine's number
        self.others: deque[int] = deque(maxlen=8)  # the latest that reached a forward that was not recorded
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "backwards": {}}

    def reset(self) -> None:
        """Forget everything accumulated."""
        #: A parameter that FSDP2 shards over the ranks, if any is: then sums and counts are those of all ranks.
        self.shard = sharded_parameter(self.layers)
        self.sums = {layer.name: LayerSums.empty(layer, self.device, self.dtype) for layer in self.layers}
        self.seen = next(iter(self.sums.values())).counts.new_zeros(())  # samples of all batches that count
        self.marks: dict[str, str] = {}
        self.never: dict[str, str] = {}  # of layers that have seen nothing: why
        self.batches = 0
        self.elsewhere = 0.0  # samples that other ranks had seen when they were synchronised
        self._warned: set[str] = set()

    # ---- what cannot be told

    def mark(self, names: Iterable[str], reason: str) -> None:
        """Tell these layers no more, for a reason that is warned of once, and raised when they are read.

        Raises:
            AttributionError: at once, where the probe is strict.
        """
        new = [name for name in names if name in self.sums and name not in self.marks]
        self.marks.update(dict.fromkeys(new, reason))
        if self.strict and new:
            raise AttributionError(_sentence(new, reason))
        if new:
            self.warn(_sentence(new, reason))

    def warn(self, message: str) -> None:
        """Warn once; not by an error, where the user's filters would make it one in the middle of training."""
        if message not in self._warned:
            self._warned.add(message)
            with suppress(CurvatureWarning):
                warnings.warn(message, CurvatureWarning, stacklevel=3)

    def saw(self, cause: str) -> None:
        """Count what a hook saw that keeps a forward from being recorded."""
        self.causes[cause] = self.causes.get(cause, 0) + 1

    def guarded(
        self, record: ForwardRecord | None, names: Iterable[str], work: Callable[..., Any], *arguments: Any
    ) -> None:
        """Do work of ours inside of the user's pass, which goes on whatever happens to it.

        Raises:
            Exception: what the work raised, where the probe is strict, or is to raise on non-finite gradients.
        """
        try:
            work(*arguments)
        except NonFiniteError:  # asked for by on_nonfinite="raise"
            raise
        except Exception as error:
            if stops_recomputation(error):
                raise
            self.fault(record, names, error)

    def leave_out(self, record: ForwardRecord | None, names: Iterable[str], reason: str) -> None:
        """Leave this batch out of layers' means, and warn of it once.

        Raises:
            AttributionError: in its place, where the probe is strict.
        """
        names = [name for name in names if name in self.sums]
        self.never.update(dict.fromkeys(names, reason))
        if record is not None:
            record.troubled |= set(names)
        if self.strict and names:
            raise AttributionError(_sentence(names, reason))
        if names:
            self.warn(f"{_sentence(names, reason)} This batch is left out of it.")

    def fault(self, record: ForwardRecord | None, names: Iterable[str], error: Exception) -> None:
        """An error of ours inside of the user's pass: the batch is left out of the layers, and training goes on.

        Raises:
            Exception: the error, where the probe is strict.
        """
        if self.strict:
            raise error
        own = isinstance(error, SecorderError)
        self.leave_out(record, names, str(error) if own else f"looking at it failed ({type(error).__name__}: {error}).")

    # ---- what records bring

    def factor(self, record: ForwardRecord) -> float:
        """What squares of g are multiplied by to be squares of ∂ℓ_n/∂z_n."""
        scale = float(record.num_samples**2) if self.reduction == "mean" else 1.0
        return scale / float(self.loss_scale()) ** 2

    def of_all(self, record: ForwardRecord) -> int:
        """Samples of the batch on all ranks that share the sums."""
        return record.num_samples if self.shard is None else record.together

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
        good = self._good(layer, [total for _, _, total in came])
        gradients = self._gradients(layer, calls, layouts)
        self._explain(record, layer, {name: [part] for name, part in gradients.items()})
        if record.weights is not None:
            gradients = {name: weighted(part, record.weights) for name, part in gradients.items()}
        record.received.add(layer.name)
        if record.attribution.sharing(layer.name):
            record.parts[layer.name] = (gradients, good)
        else:
            self._add(record, layer, [[gradients[name]] for name in layer.parameters], good)

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
        good = self._good(layers[0], [total_of(g) for call in calls for g in call.gradients if g is not None])
        squares: list[list[Tensor]] = run_isolated(lambda direct: self._rerun(record, layers, calls, direct))
        for layer, own in zip(layers, squares, strict=True):
            self._add(record, layer, own, good)
            record.received.add(layer.name)

    def _rerun(self, record: ForwardRecord, layers: list[Layer], calls: list[Any], direct: bool) -> list[list[Tensor]]:
        """Σ of squares by layer and parameter; the audit's side of them on the way."""
        sums = [
            [p.new_zeros(p.numel(), dtype=compute_dtype(layer)) for p in layer.parameters.values()] for layer in layers
        ]
        at = 0
        for chunk in rerun_gradients(layers, calls, record.num_samples, direct=direct):
            for layer, own, gradients in zip(layers, sums, chunk, strict=True):
                self._explain(record, layer, {n: [g] for n, g in zip(layer.parameters, gradients, strict=True)})
                for total, g in zip(own, gradients, strict=True):
                    flat = g.flatten(1)
                    if record.weights is not None:
                        flat = flat * record.weights[at : at + len(flat), None].to(flat)
                    total.add_((flat * flat).sum(0))
            at += len(chunk[0][0]) if chunk and chunk[0] else 0
        return sums

    def _add(
        self,
        record: ForwardRecord,
        layer: Layer,
        parts: Sequence[Tensor | Sequence[PerSample]],
        good: Tensor | None,
    ) -> None:
        """Add to each parameter's sum: Σ of squares, or those of the sum of per-sample gradients."""
        sums = self.sums[layer.name]
        before = [version(total) for total in sums.sums]
        alpha = self.factor(record)
        if self.decay is not None:
            alpha *= (1 - self.decay) / self.of_all(record)
        try:
            sums.add(layer, parts, decay=self.decay, alpha=alpha, good=good)
            sums.count(self.of_all(record) if record.counted is None else record.counted, good, self.decay)
            if good is not None:
                record.goods.append(good)
        except BaseException as error:  # out of memory, an interrupt: a part of the batch must not stay in unseen
            if before != [version(total) for total in sums.sums]:
                self.marks[layer.name] = _INTERRUPTED.format(type(error).__name__)
            raise

    def _good(self, layer: Layer, totals: Sequence[Tensor]) -> Tensor | None:
        """Whether a layer's gradients are finite, by the sums of their elements; None where every batch counts."""
        if self.on_nonfinite == "keep" or not totals:
            return None
        total = totals[0] if len(totals) == 1 else torch.stack([t.to(totals[0]) for t in totals]).sum()
        good = total.isfinite()
        if self.shard is not None:  # all ranks leave the batch out, or none
            good = good.new_tensor(not over_ranks(float(not bool(good)), self.shard, "max"))
        if self.on_nonfinite == "raise" and not bool(good):
            raise NonFiniteError(
                f"the gradient at layer {layer.name!r} holds nan or inf: lower the learning rate or the loss scale, or "
                'pass on_nonfinite="skip" to leave such batches out.'
            )
        return good

    # ---- the audit

    def _explain(self, record: ForwardRecord, layer: Layer, gradients: Mapping[str, Sequence[PerSample]]) -> None:
        backward = record.backward
        if backward is None:
            return
        for name, p in layer.parameters.items():
            vectors = backward.vectors.get(id(p))
            if vectors is not None:
                for part in gradients[name]:
                    value, size = explained(part, vectors)
                    found = (value, allowed(size, p.dtype, record.autocast_dtype, part))
                    backward.explained.setdefault((layer.name, id(p)), []).append(found)

    def _audit(self, backward: Backward) -> None:
        """Compare the whole gradients of a backward that has ended with what its records explain."""
        troubled = {name for record in backward.records for name in record.troubled}
        for layer in self.layers:
            if layer.name in troubled:
                continue
            holders = {name for record in backward.records for name in record.attribution.holders(layer.name)}
            for p in layer.parameters.values():
                whole = backward.actual.get(id(p))
                if whole is None:
                    continue
                known = [x for name in holders | {layer.name} for x in backward.explained.get((name, id(p)), ())]
                values = [value.to(whole) for value, _ in known]
                bound = sum(bound for _, bound in known) if known else 0.0
                difference = (whole - sum(values)).abs() if values else whole.abs()
                self.sums[layer.name].suspect.logical_or_((difference > bound) & whole.isfinite())

    def _audit_unreached(self, record: ForwardRecord, layer: Layer) -> None:
        """A layer that no call brought a gradient of has none: not one that came before the audit could see it, either.

        A penalty's gradient is accumulated before the backward reaches the forward, and so is that of a derivative.
        """
        records = record.backward.records if record.backward is not None else [record]
        if any(layer.name in one.received for one in records) or layer.sharded:
            return
        for p, before in zip(layer.parameters.values(), record.slots.get(layer.name, ()), strict=False):
            if p.grad is not None and slot(p) != before:
                self.sums[layer.name].suspect.logical_or_((p.grad != 0).any())

    # ---- the end of a backward

    def running(self) -> bool:
        """Whether a backward of a recorded forward runs in this thread."""
        here = threading.get_ident()
        return any(backward.thread == here for backward in self.backwards.values())

    def let_go(self, backward: Backward) -> None:
        """A backward has ended, or was broken off: nothing of ours stays on the model."""
        backward.ended = True
        self.backwards.pop(backward.number, None)
        for handles in (backward.handles, *(record.handles for record in backward.records)):
            for handle in handles:
                handle.remove()
            handles.clear()

    def forget_broken(self) -> None:
        """A forward begins outside of any backward: those of this thread that have not ended were broken off."""
        if self.backwards and not in_backward():
            here = threading.get_ident()
            for backward in [b for b in self.backwards.values() if b.thread == here]:
                self.let_go(backward)

    def abandon(self) -> None:
        """The hooks are removed: so is what hangs on parameters while a backward runs."""
        for backward in list(self.backwards.values()):
            self.let_go(backward)

    def second_backward(self, record: ForwardRecord, names: Iterable[str], before: Tensor | None, now: Tensor) -> None:
        """A second backward reaches layers through a forward whose samples are counted.

        The same loss once more changes nothing: the forward is counted once. Another loss is to be told of.
        """
        owners = [own for name in names for own in (record.attribution.sharing(name) or [name]) if own in self.sums]
        if before is None:
            self.mark(owners, _SECOND)
        else:
            for name in owners:
                self.sums[name].suspect.logical_or_(before != now)

    def check_together(self, backward: Backward, record: ForwardRecord) -> None:
        """Another forward takes part in a backward: are its samples its own, or those of the others?"""
        others = [one for one in backward.records if one is not record]
        same = [one for one in others if one.num_samples == record.num_samples]
        if not others or self.forwards == "separate" or (self.forwards is None and not same):
            return
        if self.forwards == "joined":
            if len(same) < len(others):
                self.mark(
                    record.calls,
                    'the forwards of one backward hold different numbers of samples, so that forwards="joined" cannot '
                    "be: "
                    'say forwards="separate".',
                )
            return
        both = [name for name in record.calls if any(name in one.calls for one in same)]
        self.mark(
            [own for name in both for own in (record.attribution.sharing(name) or [name])],
            "one backward runs through several forwards of the model with as many samples each, and it cannot be seen "
            'whether row n of all of them is one sample: say forwards="joined" where it is (a siamese net, a rollout), '
            "or "
            'forwards="separate" where each forward has samples of its own.',
        )

    def unrecorded(self) -> None:
        """A gradient has come to a forward that was not recorded."""
        number = current_backward()
        if number is not None:
            self.others.append(number)

    def close(self, backward: Backward, records: Sequence[ForwardRecord]) -> None:
        """A backward has ended: add what its records still hold, and audit it."""
        if records and backward.number in self.others:
            self.mark(
                [
                    own
                    for record in records
                    for name in record.calls
                    for own in record.attribution.sharing(name) or [name]
                ],
                "one backward runs through several forwards of the model of which some are not recorded (every=), so "
                "that its gradients cannot be told apart: pass every=1, or call backward for each forward.",
            )
        groups = [list(records)] if self.forwards == "joined" and records else [[record] for record in records]
        for group in groups:
            for layer in group[0].attribution.layers:
                if layer.rule is not None and any(layer.name in record.captured for record in group):
                    self.guarded(group[0], (layer.name,), self.deliver, group, layer)
            for key in dict.fromkeys(name for record in group for name in record.modules):
                parts = [x for x in (*group[0].fallback, *group[0].attribution.layers) if x.name == key]
                names = [x.name for x in group[0].parts_of(parts[0])]
                self.guarded(group[0], names, self.deliver_module, group, parts[0])
            for record in group[1:]:
                record.closed = True
            self.add(group[0])
        self._audit(backward)

    def add(self, record: ForwardRecord) -> None:
        """Close a record whose backward has ended: tied layers, zeros, counts."""
        record.closed = True
        self._add_tied(record)
        for layer in self.layers:
            name = layer.name
            if name in record.received or name in record.troubled or name in record.without_gradient:
                continue
            if not any(p.requires_grad for p in layer.parameters.values()) and name not in record.calls:
                continue
            sums = self.sums[name]
            self._audit_unreached(record, layer)
            if self.decay is not None:
                for total in sums.sums:
                    total.mul_(self.decay)
            sums.count(self.of_all(record) if record.counted is None else record.counted, None, self.decay)
        self.batches += 1
        self._count(record)

    def _count(self, record: ForwardRecord) -> None:
        """Count the samples of a batch, unless every layer left it out."""
        count: float | Tensor = self.of_all(record) if record.counted is None else record.counted
        if len(record.goods) < len(self.layers):
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

    # ---- reading

    @property
    def num_samples(self) -> int:
        """How many samples the accumulated Fisher has seen."""
        return round(float(self.seen) + self.elsewhere)

    @property
    def num_skipped(self) -> dict[str, int]:
        """How many batches were left out of a layer's mean because a gradient held nan or inf, by layer."""
        skipped = {name: sums.batches - round(float(sums.counts[2])) for name, sums in self.sums.items()}
        return {name: count for name, count in skipped.items() if count}

    def troubles(self) -> dict[str, str]:
        """By layer, why it cannot be told."""
        found = dict(self.marks)
        for name, sums in self.sums.items():
            if name not in found and bool(sums.suspect):
                found[name] = OUTSIDE
        return found

    def skip(self, names: Iterable[str]) -> None:
        """Count a batch that is left out of layers' means."""
        for name in names:
            self.sums[name].batches += 1

    def diagonals(self, missing: Literal["raise", "skip"] = "raise") -> Diagonals:
        """The mean over all samples, or the moving average; see :meth:`secorder.CurvatureProbe.fisher_diagonal`."""
        troubles = self.troubles()
        if troubles and missing == "raise":
            name, reason = next(iter(troubles.items()))
            raise AttributionError(_sentence([n for n, r in troubles.items() if r == reason] or [name], reason))
        if self.assumed:
            self.warn(self.assumed)
        counts = {name: sums.counts.tolist() for name, sums in self.sums.items()}
        if not any(samples for samples, _, _ in counts.values()):
            for name in self.sums:
                if name in self.never:
                    raise self._unseen(name)
            raise ProbeStateError(self._nothing())
        chosen = [x for x in self.layers if x.name not in troubles]
        values = {}
        for layer in chosen:
            samples, weight, _ = counts[layer.name]
            if samples:
                values[layer.name] = [total / weight for total in self.sums[layer.name].sums]
            elif missing == "raise":
                raise self._unseen(layer.name)
        chosen = [x for x in chosen if x.name in values]
        return Diagonals(chosen, values, {x.name: LayerInfo("online") for x in chosen})

    def _unseen(self, name: str) -> SecorderError:
        if self.sums[name].batches and name not in self.never:
            return NonFiniteError(
                f"every gradient of layer {name!r} so far held nan or inf: lower the learning rate or the loss scale, "
                f"or "
                'pass on_nonfinite="keep" to see them.'
            )
        reason = self.never.get(name) or (
            "no gradient reaches it in training (it is frozen, with nothing trainable before it, or no recorded batch "
            "called it): leave it out with layers=, or pass loss_fn, inputs and targets for a one-shot measurement."
        )
        return AttributionError(f"layer {name!r}: {reason}")

    def _nothing(self) -> str:
        """Why nothing is accumulated, by what the hooks saw."""
        causes = self.causes
        told = [text for key, text in CAUSES.items() if causes.get(key)]
        if not causes:
            told = [CAUSES["never called"]]
        return (
            "nothing is accumulated yet: train with the probe attached (a forward of the model, then backward), or "
            "pass "
            "loss_fn, inputs and targets for a one-shot measurement. " + " ".join(told)
        ).strip()


#: What may be behind it where nothing is accumulated.
CAUSES = {
    "never called": (
        "The model that the probe is attached to was not called: methods of it that are called in its place (such as "
        "model.forward(x), or agent.get_value(x)), and a parent that calls its parts, run no hook of it. Attach to the "
        "module that is called. A model that torch.compile had run before the probe was attached ignores hooks, too: "
        "attach to what torch.compile returned."
    ),
    "compiled": (
        "The model was compiled with what is around it (fullgraph=True, or a compiled training step), so that no hook "
        "can "
        "run: attach to what torch.compile returned for the model, or run every k-th step uncompiled."
    ),
    "traced": "The model was traced or exported while the probe was attached, which is not recorded.",
    "no grad": "It was called under torch.no_grad or in inference mode.",
    "paused": "It was called inside of probe.paused().",
    "no gradient": "Its output did not depend on any parameter that requires a gradient.",
    "forward": "It was called, and no backward has reached its parameters since (torch.autograd.grad does not count).",
    "empty": "A batch was empty.",
    "look failed": "Running the model to see where samples are failed; see the warning.",
    "not finite": "The model's output held nan or inf.",
    "one sample": (
        "The first batch held one sample, which cannot tell where samples are: such batches were left out; pass "
        "sample_dim=."
    ),
}


def quietly(work: Callable[..., Any], *arguments: Any) -> None:
    """Do work that is not to be differentiated, in the dtypes that tensors have, inside of the user's backward."""
    if torch.is_grad_enabled() or autocast_state():
        with torch.no_grad(), no_autocast():
            work(*arguments)
    else:
        work(*arguments)


def total_of(g: Tensor) -> Tensor:
    """The sum of a gradient's elements, which is finite where the squares of all of them are."""
    return g.sum(dtype=torch.promote_types(g.dtype, torch.float32))


def weighted(part: PerSample, weights: Tensor) -> PerSample:
    """A per-sample gradient with each sample's multiplied by a number."""
    return with_cotangents(part, lambda g: g * weights.to(g).view(-1, *(1,) * (g.dim() - 1)))


def _sentence(names: Sequence[str], reason: str) -> str:
    which = f"layer {names[0]!r}" if len(names) == 1 else f"layers {list(names)}"
    return f"{which}: {reason}"
