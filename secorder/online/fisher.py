"""The online Fisher: what the hooks of a probe tell, attributed to samples, checked, and added up."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .._torch.autocast import no_autocast
from ..batch import sample_sizes
from ..errors import (
    AttributionError,
    CouplingError,
    CurvatureWarning,
    InvalidArgumentError,
    NonFiniteError,
    ProbeStateError,
)
from ..layers.contraction import IN_PLACE_ELEMENTS, contract, contract_sum
from ..layers.dtypes import cast, compute_dtype, rounding, zeros
from ..layers.layout import DIM_ZERO, Layout
from ..layers.per_sample import PerSample, magnitude, per_sample_gradients, total_gradient
from ..layers.selection import Layer, sharded_parameter
from ..layers.structure import independent_by_structure
from ..oneshot.isolation import run_isolated
from ..parallel.fsdp import Shard, local, over_ranks, shard_of_sum
from ..results import Diagonals, LayerInfo, Strategy
from .attribution import Attribution, attribute
from .calls import Call, ModuleCall
from .hooks import Capture
from .loss_scale import LossScale, loss_scale_of
from .rerun import rerun_gradients

__all__ = ["Accumulation"]


@dataclass
class _Accumulator:
    """Σ of squared per-sample gradients of one layer (or their moving average), by parameter."""

    sums: list[Tensor] = field(default_factory=list)
    samples: float = 0
    batches: int = 0


#: Why a layer has no online Fisher.
_OUTSIDE = (
    "its parameters get gradient from outside of the layer's calls (a tied weight, a weight penalty in the loss, a use "
    "such as F.linear(x, layer.weight), or a derivative that the model takes of itself), which belongs to no sample "
    "that a hook can see: leave the layer out with layers=, or measure it with a one-shot call."
)


_INTERRUPTED = (
    "adding a batch to its sums was broken off (out of memory, or an interrupt), so that they hold a part of it: call "
    "reset(), or load_state_dict() with a state that was saved before."
)


#: Of the layout of :meth:`CurvatureProbe.state_dict`.
_STATE_VERSION = 2


class _Part(NamedTuple):
    """What one layer brings to the gradients of tied parameters, and what passes for rounding in it."""

    gradients: Mapping[str, PerSample]
    rounded: float


class _Sums(NamedTuple):
    """Sums over samples of one parameter's per-sample gradients: squares, themselves, absolute values."""

    squares: Tensor
    whole: Tensor
    size: Tensor


class Accumulation:
    """The online Fisher of a probe: what the hooks tell is checked, and added up.

    See :class:`secorder.CurvatureProbe` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        *,
        reduction: Literal["mean", "sum"],
        decay: float | None,
        sample_dim: int,
        strict: bool,
        loss_scale: LossScale,
        on_nonfinite: Literal["skip", "raise", "keep"],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise InvalidArgumentError(f'reduction must be "mean" or "sum", got {reduction!r}.')
        if decay is not None and not 0.0 < decay < 1.0:
            raise InvalidArgumentError(f"decay must lie between 0 and 1, got {decay!r}.")
        if isinstance(sample_dim, bool) or not isinstance(sample_dim, int) or sample_dim < 0:
            raise InvalidArgumentError(f"sample_dim must be an integer of at least 0, got {sample_dim!r}.")
        if on_nonfinite not in ("skip", "raise", "keep"):
            raise InvalidArgumentError(f'on_nonfinite must be "skip", "raise" or "keep", got {on_nonfinite!r}.')
        self.model = model
        self.layers = layers
        self.layer_names = [layer.name for layer in layers]
        self.reduction = reduction
        self.decay = decay
        self.sample_dim = sample_dim
        self.strict = strict
        self.loss_scale = loss_scale_of(loss_scale)
        self.on_nonfinite = on_nonfinite
        self.accumulator_device, self.accumulator_dtype = device, dtype
        self.capture: Capture | None = None
        self.attributions: dict[tuple[bool, ...], Attribution] = {}
        self.warned = self.warned_slow = False
        self.explained: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.modules = list(model.modules())
        self.certain = independent_by_structure(model, sample_dim)
        self.skipped: set[str] = set()
        self.parts: dict[str, _Part] = {}  # of tied layers, until the backward has brought them all
        self.mode: tuple[bool, ...] = ()
        #: A parameter that FSDP2 cuts over the ranks, if any is: then sums and counts are those of all ranks.
        self.cut = sharded_parameter(layers)
        if self.cut is not None and not all(layer.sharded for layer in layers):
            raise InvalidArgumentError(
                "some layers are sharded (fully_shard) and some are not: make a probe for each kind with layers=."
            )
        self.together = 0  # samples of the latest batch on all these ranks
        self.arguments: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget everything accumulated."""
        self.accumulators = {layer.name: _Accumulator(self._zeros(layer)) for layer in self.layers}
        self.num_skipped: dict[str, int] = {}
        self.num_samples = 0
        self.share = 0.0  # of the samples: all of them, unless ranks were synchronised
        self.unattributed: dict[str, str] = {}
        self.batches = 0

    def _zeros(self, layer: Layer) -> list[Tensor]:
        return [z.to(self.accumulator_device, self.accumulator_dtype) for z in zeros(layer)]

    def diagonals(self) -> Diagonals:
        """The mean over all samples, or the moving average; see :meth:`secorder.CurvatureProbe.fisher_diagonal`."""
        if self.num_samples == 0:
            raise ProbeStateError(
                "nothing is accumulated yet: train with the probe attached (a forward of the model, then backward), "
                "or pass loss_fn, inputs and targets for a one-shot measurement. A model that torch.compile had run "
                "before the probe was attached ignores hooks: attach first, or call torch._dynamo.reset()."
            )
        for name, reason in self.unattributed.items():
            raise AttributionError(f"layer {name!r}: {reason}")
        unseen = [n for n in self.layer_names if self.capture is not None and n in self.capture.without_gradient]
        if unseen:
            raise AttributionError(
                f"no gradient reaches the layers {unseen} in training (they are frozen, with nothing trainable before "
                "them): leave them out with layers=, or pass loss_fn, inputs and targets for a one-shot measurement."
            )
        values = {}
        for layer in self.layers:
            accumulator = self.accumulators[layer.name]
            if accumulator.samples == 0:
                raise NonFiniteError(
                    f"every gradient of layer {layer.name!r} so far held nan or inf: lower the learning rate or the "
                    'loss scale, or pass on_nonfinite="keep" to see them.'
                )
            weight = accumulator.samples if self.decay is None else 1 - self.decay**accumulator.batches
            values[layer.name] = [total / weight for total in accumulator.sums]
        return Diagonals(self.layers, values, {name: LayerInfo(Strategy.ONLINE) for name in self.layer_names})

    # ---- what the hooks tell

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Layer], int]:
        """Where samples are: found once for each combination of train and eval modes, checked again now and then."""
        self.parts, self.explained, self.skipped = {}, {}, set()  # of a backward that was broken off
        layers, count = self._prepare(args, kwargs)
        if self.cut is not None:
            self.together = round(over_ranks(max(count, 0), self.cut))
        return layers, count

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Layer], int]:
        self.mode = tuple(module.training for module in self.modules)
        self.arguments = (args, kwargs)
        if self.mode not in self.attributions or (self.wants_gradients() and not self.certain):
            if self.cut is None and 0 in sample_sizes(self.arguments, self.sample_dim):
                return self.layers, 0
            found = self._attribution(args, kwargs)
            if found.unclear:  # a batch that ends in nan tells nothing: it is left out, and the next one is looked at
                self._all_skipped()
                return self.layers, -1
            self.attributions[self.mode] = found
        found = self.attributions[self.mode]
        return found.layers, found.count(self.arguments, self.sample_dim)

    def expected(self, calls: dict[str, int]) -> bool:
        """Whether the calls of a forward are those that were seen when samples were looked for; else look again."""
        arguments = self.arguments
        self.arguments = None  # not to be kept alive
        found = self.attributions.get(self.mode)
        if found is None or found.coupled or all(n <= found.calls.get(name, 0) for name, n in calls.items()):
            return True
        again = self._attribution(*arguments)
        for name, layouts in found.layouts.items():
            again.layouts.setdefault(name, layouts)
        again.calls = {
            name: max(again.calls.get(name, 0), found.calls.get(name, 0)) for name in again.calls | found.calls
        }
        self.attributions[self.mode] = again
        return again.layers == found.layers  # enclosing changed: the next forward is recorded by them

    def _attribution(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attribution:
        with no_autocast():  # what belongs to which sample shows best in full precision
            found = run_isolated(
                lambda direct: attribute(self.model, self.layers, args, kwargs, self.sample_dim, direct=direct)
            )
        if found.coupled:
            names = [name for name in self.layer_names if name in found.unknown] or self.layer_names
            message = (
                f"the samples of a batch influence one another in the model (batch normalisation in train mode?), so "
                f"that the per-sample gradients of the layers {names} hold parts of other samples': train with "
                "model.eval() statistics, or leave the layers out with layers=."
            )
            if self.strict:
                raise CouplingError(message)
            if not self.warned:
                warnings.warn(message, CurvatureWarning, stacklevel=2)
                self.warned = True
        enclosing = {layer.name: layer.enclosing for layer in self.layers}
        slow = [x.name for x in found.layers if x.enclosing is not enclosing.get(x.name, x.enclosing)]
        if slow and not self.warned_slow:
            warnings.warn(
                f"the calls of the layers {slow} do not tell their per-sample gradients (a row that all samples share, "
                "a parameter used outside of them, nothing trainable before them): a module that contains them runs "
                "once more a step. That is exact and slow; leave them out with layers= if it is too slow.",
                CurvatureWarning,
                stacklevel=2,
            )
            self.warned_slow = True
        return found

    def layouts(self, layer: Layer, index: int, tensors: Sequence[Tensor | None], num_samples: int) -> list[Layout]:
        """Where the samples are in a call's output tensors: as found, checked against this batch's size."""
        found = self.attributions[self.mode]
        known = found.layouts.get(layer.name, [])
        chosen = known[index * len(tensors) : (index + 1) * len(tensors)] or known[: len(tensors)]
        if layer.name in found.unknown and not found.coupled:
            chosen = []
        elif found.coupled and not chosen:
            chosen = [DIM_ZERO] * len(tensors)
        for position, (tensor, layout) in enumerate(zip(tensors, chosen, strict=False)):
            if tensor is None:
                continue
            if layout.rows > 1 and num_samples:
                chosen[position] = layout = layout._replace(rows=max(1, tensor.shape[0] // num_samples))
            if tensor.dim() <= layout.dim or tensor.shape[layout.dim] != layout.rows * num_samples:
                chosen = []
                break
        if layer.name in found.outside:
            raise AttributionError(f"layer {layer.name!r}: {_OUTSIDE}")
        if found.ambiguous:
            raise AttributionError(
                f"the model's arguments have sizes {found.ambiguous} in dim {self.sample_dim}, and its output "
                "does not tell which of them is the number of samples: let the model return a tensor of that size, or "
                "measure with one-shot calls."
            )
        if not chosen:
            shapes = [tuple(t.shape) for t in tensors if t is not None]
            raise AttributionError(
                f"layer {layer.name!r} returned {shapes} for a batch of {num_samples} samples, and no dimension of it "
                "holds them (a row that all samples share, or samples in another dimension of the model's inputs: see "
                "sample_dim): leave the layer out with layers=, or measure it with a one-shot call."
            )
        return list(chosen)

    def _factors(self, count: int) -> tuple[float, float]:
        # g is ∂L/∂z, and L the mean of the ℓ_n: ∂ℓ_n/∂z_n is N times as large.
        scale = float(count**2) if self.reduction == "mean" else 1.0
        scale /= self.loss_scale() ** 2
        return (1.0, scale) if self.decay is None else (self.decay, (1 - self.decay) * scale / self._of_all(count))

    def _of_all(self, count: int) -> int:
        """Samples of the batch on all ranks that share the accumulators, for so many on this one."""
        return count if self.cut is None else self.together

    def _rounding(self, tensors: Iterable[Tensor]) -> float:
        capture = self.capture
        low = None if capture is None else capture.autocast_dtype
        return max(rounding(dtype) for dtype in [*(t.dtype for t in tensors), *([low] if low is not None else [])])

    def _all_skipped(self) -> None:
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                "the model's output holds nan or inf: look at the inputs, lower the learning rate or the scale, or "
                'pass on_nonfinite="skip" to leave such batches out.'
            )
        self._count_skipped(self.layer_names)

    def _count_skipped(self, names: Iterable[str]) -> None:
        for name in names:
            self.num_skipped[name] = self.num_skipped.get(name, 0) + 1

    def _skips(self, layer: Layer, gradients: Sequence[Tensor]) -> bool:
        """Whether a layer's gradient holds nan or inf and is left out."""
        if self.on_nonfinite == "keep":
            return False
        bad = not all(math.isfinite(g.sum(dtype=torch.float32)) for g in gradients)
        bad = bad and not all(bool(g.isfinite().all()) for g in gradients)  # or finite numbers whose sum overflowed
        if self.cut is not None:  # all ranks leave the batch out, or none
            bad = bool(over_ranks(bad, self.cut, "max"))
        if not bad:
            return False
        if self.on_nonfinite == "raise":
            raise NonFiniteError(
                f"the gradient at layer {layer.name!r} holds nan or inf: lower the learning rate or the loss scale, or "
                'pass on_nonfinite="skip" to leave such batches out.'
            )
        names = set(self.attributions[self.mode].sharing(layer.name) or [layer.name]) - self.skipped
        self._count_skipped(names)
        self.skipped |= names
        return True

    def receive(self, layer: Layer, calls: list[Call], layouts: list[Layout], count: int) -> None:
        """Add the squares of a layer's per-sample gradients."""
        assert layer.rule is not None
        if self._skips(layer, [g for _, g in calls]):
            return
        kind = compute_dtype(layer)
        rounded = self._rounding(g for _, g in calls) if self.wants_gradients() else 0.0
        if any(g.dtype is not kind or inputs[0].dtype is not kind for inputs, g in calls):
            calls = [(tuple(cast(x, kind) for x in inputs), cast(g, kind)) for inputs, g in calls]
        gradients = per_sample_gradients(layer.rule, layer.module, calls, layouts)
        if self.attributions[self.mode].sharing(layer.name):
            self.parts[layer.name] = _Part(gradients, rounded)
        else:
            self._add(layer, {name: [gradient] for name, gradient in gradients.items()}, rounded, count)

    def _add(self, layer: Layer, gradients: Mapping[str, list[PerSample]], rounded: float, count: int) -> None:
        """Add the squares of a layer's per-sample gradients, each parameter's the sum of those listed."""
        accumulator = self.accumulators[layer.name]
        begun = False
        try:
            for (name, p), total in zip(layer.parameters.items(), accumulator.sums, strict=True):
                begun = begun or p.numel() > IN_PLACE_ELEMENTS
                self._add_parameter(layer, p, total, gradients[name], count)
                begun = True
        except BaseException:  # out of memory, an interrupt: a part of the batch must not stay in unseen
            if begun:
                self.unattributed[layer.name] = _INTERRUPTED
            raise
        if self.wants_gradients():
            self.explained[layer.name] = [
                (
                    _total([total_gradient(g, p.numel()) for g in gradients[name]]),
                    rounded * _total([magnitude(g, p.numel()) for g in gradients[name]]),
                )
                for name, p in layer.parameters.items()
            ]
        accumulator.samples += self._of_all(count)
        accumulator.batches += 1

    def _add_parameter(
        self, layer: Layer, p: nn.Parameter, total: Tensor, gradients: list[PerSample], count: int
    ) -> None:
        beta, alpha = self._factors(count)
        if not gradients:
            total.mul_(beta)
        elif layer.sharded:
            part = contract_sum(gradients, numel=p.numel(), alpha=alpha)  # by this rank's samples
            total.mul_(beta).add_(shard_of_sum(part, p).to(total))
        elif total.dtype is compute_dtype(layer) and total.device == p.device:
            contract_sum(gradients, numel=p.numel(), out=total, beta=beta, alpha=alpha)
        else:
            total.mul_(beta).add_(contract_sum(gradients, numel=p.numel()).to(total), alpha=alpha)

    def receive_module(self, layers: list[Layer], calls: list[ModuleCall], count: int) -> None:
        """The same for layers that are parts of a module without a rule."""
        known = [g for call in calls for g in call.gradients if g is not None]
        if sum(self._skips(layer, known) for layer in layers):  # each is counted
            return
        beta, alpha = self._factors(count)
        parts: list[list[_Sums]] = run_isolated(lambda direct: self._module_sums(layers, calls, count, direct))
        for layer, sums in zip(layers, parts, strict=True):
            accumulator = self.accumulators[layer.name]
            for part, total in zip(sums, accumulator.sums, strict=True):
                total.mul_(beta).add_(part.squares.to(total), alpha=alpha)
            rounded = self._rounding(g for call in calls for g in call.gradients if g is not None)
            self.explained[layer.name] = [(part.whole, rounded * part.size.amax()) for part in sums]
            accumulator.samples += self._of_all(count)
            accumulator.batches += 1

    @staticmethod
    def _module_sums(layers: list[Layer], calls: list[ModuleCall], count: int, direct: bool) -> list[list["_Sums"]]:
        sums = [[_Sums(*(torch.zeros_like(t) for _ in range(3))) for t in zeros(layer)] for layer in layers]
        for chunk in rerun_gradients(layers, calls, count, direct=direct):
            for own, gradients in zip(sums, chunk, strict=True):
                for part, dense in zip(own, gradients, strict=True):
                    part.squares.add_(contract(dense, numel=part.squares.numel()))
                    part.whole.add_(dense.sum(0).flatten())
                    part.size.add_(dense.abs().sum(0).flatten())
        return sums

    def wants_gradients(self) -> bool:
        """At the recorded batches 1, 2, 4, 8, …: whether the captured calls explain the whole gradient."""
        batch = self.batches + 1
        return batch & (batch - 1) == 0

    def finish(self, count: int, received: set[str], gradients: dict[int, Tensor]) -> None:
        """Count the batch, with zeros for the layers that its loss does not depend on."""
        found = self.attributions.get(self.mode, Attribution())
        for layer in found.layers:
            if layer.name not in received and layer.name in found.outside:
                self.unattributed[layer.name] = _OUTSIDE
        skipped, self.skipped = self.skipped, set()
        received = received | skipped | self._add_tied(found, skipped, count)
        explained, self.explained = self.explained, {}
        if self.wants_gradients() and not skipped:
            self._check(explained, gradients)
        for name, accumulator in self.accumulators.items():
            if name not in received:
                if self.decay is not None:
                    for total in accumulator.sums:
                        total.mul_(self.decay)
                accumulator.samples += self._of_all(count)
                accumulator.batches += 1
        if skipped < set(self.accumulators):
            self.num_samples += self._of_all(count)
            self.share += self._of_all(count)
        self.batches += 1
        if self.unattributed:
            name, reason = next(iter(self.unattributed.items()))
            raise AttributionError(f"layer {name!r}: {reason}")

    def _add_tied(self, found: Attribution, skipped: set[str], count: int) -> set[str]:
        """Add what the layers that share a parameter brought in this backward; returns the layers that got it."""
        parts, self.parts = self.parts, {}
        added = set()
        for layer in self.layers:
            holders = found.ties.get(layer.name, {})
            brought = {
                local: [(parts[name], own) for name, own in by if name in parts] for local, by in holders.items()
            }
            here = [part for pairs in brought.values() for part, _ in pairs]
            if here and layer.name not in skipped:
                gradients = {local: [part.gradients[own] for part, own in pairs] for local, pairs in brought.items()}
                self._add(layer, gradients, max(part.rounded for part in here), count)
                added.add(layer.name)
        return added

    def _check(self, explained: dict[str, list[tuple[Tensor, Tensor]]], gradients: dict[int, Tensor]) -> None:
        for layer in self.layers:
            for index, parameter in enumerate(layer.parameters.values()):
                whole = gradients.get(id(parameter))
                if whole is None:
                    continue
                if layer.name in explained:
                    known, bound = explained[layer.name][index]
                    allowed = bound + self._rounding([whole]) * whole.abs().amax()
                    strange = (whole.flatten() - known).abs().amax() > allowed
                else:  # no call of the layer was seen
                    strange = (whole != 0).any()
                if bool(strange):
                    self.unattributed[layer.name] = _OUTSIDE

    # ---- checkpoints and ranks

    def state_dict(self) -> dict[str, Tensor]:
        """See :meth:`secorder.CurvatureProbe.state_dict`."""
        capture = self.capture
        counts = [0, 0] if capture is None else [capture.counts[True], capture.counts[False]]
        header = [_STATE_VERSION, int(self.reduction == "sum"), self.num_samples, self.batches, *counts]
        state = {
            "header": torch.tensor(header),
            "decay": torch.tensor(self.decay or 0.0, dtype=torch.float64),
            "share": torch.tensor(self.share, dtype=torch.float64),
        }
        for layer in self.layers:
            accumulator = self.accumulators[layer.name]
            skipped = self.num_skipped.get(layer.name, 0)
            state[f"counts/{layer.name}"] = torch.tensor(
                [accumulator.samples, accumulator.batches, skipped], dtype=torch.float64
            )
            for (name, p), total in zip(layer.parameters.items(), accumulator.sums, strict=True):
                state[f"sums/{layer.parameter_name(name)}"] = (
                    Shard.of(p).place(total.clone()) if layer.sharded else total.clone()
                )
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`secorder.CurvatureProbe.load_state_dict`."""
        header = state.get("header") if isinstance(state, Mapping) else None
        if not isinstance(header, Tensor) or int(header[0]) != _STATE_VERSION:
            raise InvalidArgumentError(
                f"the state is not one of CurvatureProbe.state_dict(), version {_STATE_VERSION}."
            )
        _, is_sum, num_samples, batches, *counts = header.tolist()
        theirs = ("sum" if is_sum else "mean", float(state["decay"]) or None)
        for key, own, other in zip(("reduction", "decay"), (self.reduction, self.decay), theirs, strict=True):
            if own != other:
                raise InvalidArgumentError(f"the state was accumulated with {key}={other!r}, not {own!r}.")
        sizes = {
            f"sums/{layer.parameter_name(name)}": p.numel()
            for layer in self.layers
            for name, p in layer.parameters.items()
        }
        found = {key: value.numel() for key, value in state.items() if key.startswith("sums/")}
        different = sorted(key.removeprefix("sums/") for key in sizes.keys() ^ found.keys())
        if different:
            raise InvalidArgumentError(f"the state and the probe differ in the parameters {different}.")
        different = sorted(key.removeprefix("sums/") for key, size in sizes.items() if found[key] != size)
        if different:
            raise InvalidArgumentError(f"the state has other shapes of the parameters {different}.")
        for layer in self.layers:
            samples, seen, skipped = state[f"counts/{layer.name}"].tolist()
            sums = [
                local(state[f"sums/{layer.parameter_name(name)}"]).flatten().to(like, copy=True)
                for name, like in zip(layer.parameters, self._zeros(layer), strict=True)
            ]
            self.accumulators[layer.name] = _Accumulator(sums, samples, int(seen))
            if skipped:
                self.num_skipped[layer.name] = int(skipped)
        self.unattributed = {}
        self.share = float(state["share"])
        self.num_samples, self.batches = num_samples, batches
        if self.capture is not None:
            self.capture.counts[True], self.capture.counts[False] = counts

    def synchronize(self, group: "torch.distributed.ProcessGroup | None" = None) -> None:
        """See :meth:`secorder.CurvatureProbe.synchronize`."""
        import torch.distributed as dist

        from ..parallel.all_reduce import add_up

        if self.cut is not None:
            return  # sums are those of all ranks at every step
        accumulators = [self.accumulators[layer.name] for layer in self.layers]
        weights = [a.samples if self.decay is None else 1 - self.decay**a.batches for a in accumulators]
        numbers = torch.tensor([self.share, self.batches, *weights], dtype=torch.float64)
        add_up([numbers, *(total for a in accumulators for total in a.sums)], group)
        ranks = dist.get_world_size(group)
        share, batches, *totals = numbers.tolist()
        self.share, self.num_samples, self.batches = share / ranks, round(share), round(batches)
        for accumulator, weight in zip(accumulators, totals, strict=True):
            if self.decay is None:
                accumulator.samples = weight / ranks
                factor = 1 / ranks
            else:  # the weight of a moving average of that many batches, on every rank
                accumulator.batches = max(self.batches, 1)
                factor = (1 - self.decay**accumulator.batches) / weight if weight else 0.0
            for total in accumulator.sums:
                total.mul_(factor)


def _total(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum(0) if tensors else torch.zeros(())
